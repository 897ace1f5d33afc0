// Backward of sparse MLA for Hopper: q [t, h, 576], latent KV [T, 576] (value = first 512 columns), indices [t, k] with -1 = no key.
//
// One block works on one query and up to 64 of its heads; keys come in groups of 64. Shared memory (224 KB) holds Q [64, 576],
// dO [64, 512], the gathered keys K [64, 576], and P and dS [64 heads, 64 keys] in bf16.
//   warpgroup 0:  S = Q K'      P  = e^(scale S - lse)
//   warpgroup 1:  dP = dO V'    dS = scale P (dP - delta)
//   both, each on its own columns (0..255 | 256..575):
//                 dQ += dS K    (kept in registers over all keys of the query)
//                 dKV = dS' Q + P' dO   (leaves at once: see Store)
// The next keys are fetched while dKV, which does not need K, is computed.
//
// Store: the contributions of a (query, key) pair are either added to dKV in float32 (kReduce), or written in bf16 to a row of their own
// (kStage) and summed by key in a second pass. The second is faster: float32 reductions are twice the bytes, read and written.
//
// Within each 16 columns of Q, dO and K the pairs are stored in the order 0 2 4 6 1 3 5 7 (sums over columns do not care). A thread's
// accumulators of two neighbouring 8-column groups are then 4 consecutive columns of the result: one 16-byte reduction, one 8-byte
// store of dQ.
#include "hopper.cuh"

#include <utility>

using namespace hopper;

namespace {

constexpr int kDK = 576, kDV = 512, kHeads = 64, kKeys = 64;
constexpr int kQ = 0, kDO = kQ + 9 * kTileBytes, kK = kDO + 8 * kTileBytes, kP = kK + 9 * kTileBytes, kDS = kP + kTileBytes;
constexpr int kIndex = kDS + kTileBytes, kSharedBytes = kIndex + 2 * kKeys * 4;

enum Store { kReduce = 0, kDrop = 1, kStage = 2 };  // kDrop computes dKV and forgets it, to time the rest

// 16 columns (32 bytes), pairs 0..7 -> 0 2 4 6 | 1 3 5 7.
__device__ __forceinline__ void permute16(uint4& low, uint4& high) {
    uint4 a = {low.x, low.z, high.x, high.z}, b = {low.y, low.w, high.y, high.w};
    low = a, high = b;
}

__device__ __forceinline__ void load_rows(char* to, const __nv_bfloat16* from, int rows, int columns) {
    const int pieces = columns / 16;
#pragma unroll 4
    for (int i = threadIdx.x; i < kHeads * pieces; i += blockDim.x) {
        const int row = i / pieces, piece = i % pieces;
        uint4 low = {0, 0, 0, 0}, high = low;
        if (row < rows) {
            const uint4* source = reinterpret_cast<const uint4*>(from + static_cast<int64_t>(row) * columns + piece * 16);
            low = __ldg(source), high = __ldg(source + 1);
        }
        permute16(low, high);
        char* tile = to + piece / 4 * kTileBytes;
        *reinterpret_cast<uint4*>(tile + swizzled(row, piece % 4 * 2)) = low;
        *reinterpret_cast<uint4*>(tile + swizzled(row, piece % 4 * 2 + 1)) = high;
    }
}

// Predicated, not branched around: a branch while a wgmma is under way would make the compiler wait for it first. The offset is part of
// the instruction, so that one address serves all columns.
template <int kOffset>
__device__ __forceinline__ void reduce4(float* to, int key, float a, float b, float c, float d) {
    asm volatile("{\n.reg .pred p;\nsetp.ge.s32 p, %5, 0;\n@p red.global.add.v4.f32 [%0 + %6], {%1, %2, %3, %4};\n}\n" ::"l"(to), "f"(a),
                 "f"(b), "f"(c), "f"(d), "r"(key), "n"(kOffset * 4)
                 : "memory");
}
__device__ __forceinline__ void asm_keep(float v) { asm volatile("" ::"f"(v)); }
__device__ __forceinline__ uint32_t pair(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(both);
}
template <int kOffset>
__device__ __forceinline__ void store8(__nv_bfloat16* to, int key, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("{\n.reg .pred p;\nsetp.ge.s32 p, %5, 0;\n@p st.global.cs.v4.b32 [%0 + %6], {%1, %2, %3, %4};\n}\n" ::"l"(to), "r"(a),
                 "r"(b), "r"(c), "r"(d), "r"(key), "n"(kOffset * 2)
                 : "memory");
}

// d: accumulators of a warpgroup for 64 keys x kRegisters * 2 columns, from kColumn on; a key of -1 is left out.
// Staged rows hold each thread's 8 columns of every 32 side by side (16-byte stores of whole 64-byte lines); sum_by_key undoes it.
template <int kStore, int kColumn, int kRegisters>
__device__ __forceinline__ void put_keys(const float (&d)[kRegisters], float* grad_kv, int key_low, int key_high, int64_t slot, int row,
                                         int lane) {
    [&]<int... kPart>(std::integer_sequence<int, kPart...>) {
        if constexpr (kStore == kReduce) {
            float* low = grad_kv + static_cast<int64_t>(max(key_low, 0)) * kDK + (lane & 3) * 4;
            float* high = grad_kv + static_cast<int64_t>(max(key_high, 0)) * kDK + (lane & 3) * 4;
            (reduce4<kColumn + kPart * 16>(low, key_low, d[kPart * 8], d[kPart * 8 + 1], d[kPart * 8 + 4], d[kPart * 8 + 5]), ...);
            (reduce4<kColumn + kPart * 16>(high, key_high, d[kPart * 8 + 2], d[kPart * 8 + 3], d[kPart * 8 + 6], d[kPart * 8 + 7]), ...);
        } else if constexpr (kStore == kStage) {
            __nv_bfloat16* to = reinterpret_cast<__nv_bfloat16*>(grad_kv) + (slot + row) * kDK + (lane & 3) * 8;
            auto put = [&]<int kTwo>() {
                constexpr int i = kTwo * 16;
                store8<kColumn + kTwo * 32>(to, key_low, pair(d[i], d[i + 1]), pair(d[i + 4], d[i + 5]), pair(d[i + 8], d[i + 9]),
                                            pair(d[i + 12], d[i + 13]));
                store8<kColumn + kTwo * 32 + 8 * kDK>(to, key_high, pair(d[i + 2], d[i + 3]), pair(d[i + 6], d[i + 7]),
                                                      pair(d[i + 10], d[i + 11]), pair(d[i + 14], d[i + 15]));
            };
            ((kPart % 2 == 0 ? put.template operator()<kPart / 2>() : void()), ...);
        } else {
            (asm_keep(d[kPart * 8]), ...);  // keeps the product alive
        }
    }(std::make_integer_sequence<int, kRegisters / 8>{});
}

template <int kRegisters>
__device__ __forceinline__ void put_query(const float (&d)[kRegisters], __nv_bfloat16* grad_q, int rows, int column, int row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int head = row + half * 8;
        if (head >= rows) continue;
#pragma unroll
        for (int m = 0; m < kRegisters / 8; ++m) {
            const int i = m * 8 + half * 2;
            __nv_bfloat162 low = __floats2bfloat162_rn(d[i], d[i + 1]), high = __floats2bfloat162_rn(d[i + 4], d[i + 5]);
            uint2 both = {reinterpret_cast<uint32_t&>(low), reinterpret_cast<uint32_t&>(high)};
            *reinterpret_cast<uint2*>(grad_q + static_cast<int64_t>(head) * kDK + column + m * 16 + (lane & 3) * 4) = both;
        }
    }
}

// d (+)= rows' of `left` (P or dS) times kTiles x 64 columns of `right` (dO or Q) from tile `tile` on.
template <int kRegisters>
__device__ __forceinline__ void add_across(float (&d)[kRegisters], uint64_t left, uint64_t right, int tile, bool accumulate) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const uint64_t a = beyond(left, step * 2048), b = beyond(right, tile * kTileBytes + step * 2048);
        if constexpr (kRegisters == 64) mma128<1, 1>(d, a, b, accumulate || step > 0);
        else mma64<1, 1>(d, a, b, accumulate || step > 0);
    }
}

struct Arguments {
    const __nv_bfloat16 *q, *kv_permuted, *grad_out;
    const int* indices;
    const float *lse, *delta;  // [t, h]; lse natural
    __nv_bfloat16* grad_q;
    float* grad_kv;  // [T, 576]; when staging [t * k, 576] contributions in bf16
    int t, h, k;
    float scale;
};

struct Place {
    char* shared;
    uint32_t base;
    int query, first_head, rows, blocks, lane, row;
};

// One warpgroup's part. The two run the same steps on their own columns but differ in what they compute first; as separate code, so that
// the compiler sees every wgmma in straight-line order (a branch between two of them makes it serialise all).
template <int kStore, int kWarpgroup>
__device__ __forceinline__ void work(const Arguments& x, const Place& at) {
    constexpr int kFirstTile = kWarpgroup * 4;
    constexpr float kLog2e = 1.4426950408889634f;
    char* const shared = at.shared;
    const uint32_t base = at.base;
    const uint64_t shared_operand = operand(base);
    const int lane = at.lane, row = at.row, blocks = at.blocks;
    const int64_t head_row = static_cast<int64_t>(at.query) * x.h + at.first_head;
    const int* indices = x.indices + static_cast<int64_t>(at.query) * x.k;

    // Gather: 8 threads fetch one 128-byte row of a tile; a thread serves rows copy_row and copy_row + 32 of all 9 tiles.
    const int copy_row = threadIdx.x / 8, unit = threadIdx.x & 7;
    auto index_at = [&](int block, int r) {
        const int i = block * kKeys + r;
        return block < blocks && i < x.k ? __ldg(indices + i) : -1;
    };
    int low = index_at(0, copy_row), high = index_at(0, copy_row + 32);
    auto fetch = [&](int block) {
        if (block < blocks) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = half ? high : low, r = copy_row + half * 32;
                const char* source = reinterpret_cast<const char*>(x.kv_permuted + static_cast<int64_t>(max(key, 0)) * kDK) + unit * 16;
                const uint32_t to = base + kK + swizzled(r, unit);
#pragma unroll
                for (int tile = 0; tile < 9; ++tile) copy16_async(to + tile * kTileBytes, source + tile * 128, key >= 0);
                if (unit == 0) reinterpret_cast<int*>(shared + kIndex)[(block & 1) * kKeys + r] = key;
            }
            low = index_at(block + 1, copy_row), high = index_at(block + 1, copy_row + 32);
        }
        copies_commit();
    };
    fetch(0);

    float of_row[2];  // warpgroup 0: lse in log2 units; warpgroup 1: delta
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int head = row + half * 8;
        // A head that does not exist: lse = inf makes every probability 0.
        if constexpr (kWarpgroup == 0) of_row[half] = head < at.rows ? x.lse[head_row + head] * kLog2e : __int_as_float(0x7f800000);
        else of_row[half] = head < at.rows ? x.delta[head_row + head] : 0.f;
    }

    float dq[128], dq_rope[kWarpgroup ? 32 : 1];
#pragma unroll
    for (int i = 0; i < 128; ++i) dq[i] = 0.f;
    if constexpr (kWarpgroup == 1) {
#pragma unroll
        for (int i = 0; i < 32; ++i) dq_rope[i] = 0.f;
    }

    for (int block = 0; block < blocks; ++block) {
        copies_wait<0>();
        publish_to_wgmma();
        barrier_sync(0, 256);  // keys are there; P and dS of the last block are no longer read
        const int* keys = reinterpret_cast<const int*>(shared + kIndex) + (block & 1) * kKeys;
        const int64_t slot = static_cast<int64_t>(at.query) * x.k + block * kKeys;
        float s[32], dkv[64];
        if constexpr (kWarpgroup == 0) {
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 36; ++step) {
                const int i = step / 4 * kTileBytes + step % 4 * 32;
                mma64<0, 0>(s, beyond(shared_operand, kQ + i), beyond(shared_operand, kK + i), step > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            settle(s);
            const float factor = x.scale * kLog2e;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int2 key = *reinterpret_cast<const int2*>(keys + j * 8 + (lane & 3) * 2);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float a = key.x < 0 ? 0.f : exp2_of(fmaf(s[j * 4 + half * 2], factor, -of_row[half]));
                    const float b = key.y < 0 ? 0.f : exp2_of(fmaf(s[j * 4 + half * 2 + 1], factor, -of_row[half]));
                    *reinterpret_cast<__nv_bfloat162*>(shared + kP + swizzled(row + half * 8, j) + (lane & 3) * 4) =
                        __floats2bfloat162_rn(a, b);
                }
            }
            publish_to_wgmma();
            barrier_arrive(1, 256);
            barrier_sync(3, 128);
            // The value part needs no dS: it runs while warpgroup 1 computes that.
            wgmma_begin();
            add_across(dkv, beyond(shared_operand, kP), beyond(shared_operand, kDO), kFirstTile, false);
            wgmma_commit();
        } else {
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 32; ++step) {
                const int i = step / 4 * kTileBytes + step % 4 * 32;
                mma64<0, 0>(s, beyond(shared_operand, kDO + i), beyond(shared_operand, kK + i), step > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            settle(s);
            barrier_sync(1, 256);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int i = swizzled(row + half * 8, j) + (lane & 3) * 4;
                    const float2 p = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(shared + kP + i));
                    *reinterpret_cast<__nv_bfloat162*>(shared + kDS + i) =
                        __floats2bfloat162_rn(p.x * (s[j * 4 + half * 2] - of_row[half]) * x.scale,
                                              p.y * (s[j * 4 + half * 2 + 1] - of_row[half]) * x.scale);
                }
            }
            publish_to_wgmma();
        }
        barrier_sync(2, 256);

        wgmma_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            mma256<0, 1>(dq, beyond(shared_operand, kDS + step * 32), beyond(shared_operand, kK + kFirstTile * kTileBytes + step * 2048), true);
        if constexpr (kWarpgroup == 1) {
#pragma unroll
            for (int step = 0; step < 4; ++step)
                mma64<0, 1>(dq_rope, beyond(shared_operand, kDS + step * 32), beyond(shared_operand, kK + 8 * kTileBytes + step * 2048), true);
        }
        wgmma_commit();
        if constexpr (kWarpgroup == 1) add_across(dkv, beyond(shared_operand, kP), beyond(shared_operand, kDO), kFirstTile, false);
        add_across(dkv, beyond(shared_operand, kDS), beyond(shared_operand, kQ), kFirstTile, true);
        wgmma_commit();
        wgmma_wait<1>();
        barrier_sync(0, 256);  // nobody reads these keys any more
        fetch(block + 1);
        const int key_low = keys[row], key_high = keys[row + 8];
        wgmma_wait<0>();
        settle(dkv);
        put_keys<kStore, kFirstTile * 64>(dkv, x.grad_kv, key_low, key_high, slot, row, lane);

        wgmma_begin();
        add_across(dkv, beyond(shared_operand, kP), beyond(shared_operand, kDO), kFirstTile + 2, false);
        add_across(dkv, beyond(shared_operand, kDS), beyond(shared_operand, kQ), kFirstTile + 2, true);
        wgmma_commit();
        wgmma_wait<0>();
        settle(dkv);
        put_keys<kStore, kFirstTile * 64 + 128>(dkv, x.grad_kv, key_low, key_high, slot, row, lane);
        if constexpr (kWarpgroup == 1) {
            wgmma_begin();
            add_across(s, beyond(shared_operand, kDS), beyond(shared_operand, kQ), 8, false);
            wgmma_commit();
            wgmma_wait<0>();
            settle(s);
            put_keys<kStore, kDV>(s, x.grad_kv, key_low, key_high, slot, row, lane);
        }
    }
    settle(dq);
    if constexpr (kWarpgroup == 1) settle(dq_rope);
    __nv_bfloat16* grad_q = x.grad_q + head_row * kDK;
    put_query(dq, grad_q, at.rows, kWarpgroup * 256, row, lane);
    if constexpr (kWarpgroup == 1) put_query(dq_rope, grad_q, at.rows, kDV, row, lane);
}

template <int kStore>
__global__ void __launch_bounds__(256, 1) backward(const Arguments x) {
    extern __shared__ __align__(1024) char shared[];
    const int first_head = blockIdx.y * kHeads, lane = threadIdx.x & 31;
    const int64_t head_row = static_cast<int64_t>(blockIdx.x) * x.h + first_head;
    Place at{shared, smem_address(shared), static_cast<int>(blockIdx.x), first_head, min(kHeads, x.h - first_head), 0, lane,
             static_cast<int>(threadIdx.x & 127) / 32 * 16 + lane / 4};
    int* last = reinterpret_cast<int*>(shared + kIndex);
    if (threadIdx.x == 0) *last = -1;
    int mine = -1;
    for (int i = threadIdx.x; i < x.k; i += 256)
        if (__ldg(x.indices + static_cast<int64_t>(at.query) * x.k + i) >= 0) mine = i;
    mine = __reduce_max_sync(0xffffffffu, mine);
    load_rows(shared + kQ, x.q + head_row * kDK, at.rows, kDK);
    load_rows(shared + kDO, x.grad_out + head_row * kDV, at.rows, kDV);
    __syncthreads();
    if (lane == 0 && mine >= 0) atomicMax(last, mine);
    __syncthreads();
    at.blocks = *last < 0 ? 0 : *last / kKeys + 1;
    __syncthreads();  // the gather writes indices where `last` lies
    if (threadIdx.x < 128) work<kStore, 0>(x, at);
    else work<kStore, 1>(x, at);
}

__global__ void permute_keys(const uint4* from, uint4* to, int64_t pieces) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= pieces) return;
    uint4 low = __ldg(from + 2 * i), high = __ldg(from + 2 * i + 1);
    permute16(low, high);
    to[2 * i] = low, to[2 * i + 1] = high;
}

// delta[row] = sum over 512 columns of out * grad_out; one warp per row.
__global__ void row_dot(const __nv_bfloat16* out, const __nv_bfloat16* grad_out, float* delta, int64_t rows) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const int lane = threadIdx.x & 31;
    float sum = 0.f;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        const uint4 a = __ldg(reinterpret_cast<const uint4*>(out + row * kDV) + part * 32 + lane);
        const uint4 b = __ldg(reinterpret_cast<const uint4*>(grad_out + row * kDV) + part * 32 + lane);
        const __nv_bfloat162 *pa = reinterpret_cast<const __nv_bfloat162*>(&a), *pb = reinterpret_cast<const __nv_bfloat162*>(&b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 fa = __bfloat1622float2(pa[i]), fb = __bfloat1622float2(pb[i]);
            sum = fmaf(fa.x, fb.x, fmaf(fa.y, fb.y, sum));
        }
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) delta[row] = sum;
}

// counts[key] += 1 for every listed key.
__global__ void count_keys(const int* indices, int64_t n, int* counts) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n && indices[i] >= 0) atomicAdd(counts + indices[i], 1);
}

// order[next[key]++] = place of each listed key, in no particular order within a key; `next` starts as the first place of each key.
__global__ void place_keys(const int* indices, int64_t n, int* next, int* order) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n && indices[i] >= 0) order[atomicAdd(next + indices[i], 1)] = static_cast<int>(i);
}

// grad_kv[key] += the staged rows order[ends[key - 1] .. ends[key]], without atomics. One block per key; 4 rows of threads take every
// fourth contribution and are added in a fixed order: with the same `order`, the same bits.
__global__ void sum_by_key(const __nv_bfloat16* staged, const int* order, const int* ends, float* grad_kv) {
    constexpr int kPieces = kDK / 8;
    __shared__ float parts[3][kDK];
    const int64_t key = blockIdx.x;
    const int begin = key ? ends[key - 1] : 0, end = ends[key];
    if (begin == end) return;
    const int piece = threadIdx.x % kPieces, part = threadIdx.x / kPieces;
    float sum[8] = {};
#pragma unroll 4
    for (int i = begin + part; i < end; i += 4) {
        const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(staged + static_cast<int64_t>(order[i]) * kDK) + piece);
        const __nv_bfloat162* v = reinterpret_cast<const __nv_bfloat162*>(&raw);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float2 two = __bfloat1622float2(v[c]);
            sum[2 * c] += two.x, sum[2 * c + 1] += two.y;
        }
    }
    if (part > 0) {
#pragma unroll
        for (int c = 0; c < 8; ++c) parts[part - 1][piece * 8 + c] = sum[c];
    }
    __syncthreads();
    if (part == 0) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] = ((sum[c] + parts[0][piece * 8 + c]) + parts[1][piece * 8 + c]) + parts[2][piece * 8 + c];
        // Two runs of 4 columns, 16 apart (put_keys).
        float4* to = reinterpret_cast<float4*>(grad_kv + key * kDK + piece / 4 * 32 + piece % 4 * 4);
        float4 a = to[0], b = to[4];
        a.x += sum[0], a.y += sum[1], a.z += sum[2], a.w += sum[3];
        b.x += sum[4], b.y += sum[5], b.z += sum[6], b.w += sum[7];
        to[0] = a, to[4] = b;
    }
}

template <int kStore>
cudaError_t launch(const Arguments& x, cudaStream_t stream) {
    cudaError_t error = cudaFuncSetAttribute(backward<kStore>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    backward<kStore><<<dim3(x.t, (x.h + kHeads - 1) / kHeads), 256, kSharedBytes, stream>>>(x);
    return cudaGetLastError();
}

}  // namespace

extern "C" {

int sparse_mla_permute_keys(const void* kv, void* permuted, int64_t tokens, cudaStream_t stream) {
    const int64_t pieces = tokens * (kDK / 16);
    if (pieces) permute_keys<<<(pieces + 255) / 256, 256, 0, stream>>>(static_cast<const uint4*>(kv), static_cast<uint4*>(permuted), pieces);
    return cudaGetLastError();
}

int sparse_mla_row_dot(const void* out, const void* grad_out, float* delta, int64_t rows, cudaStream_t stream) {
    if (rows)
        row_dot<<<(rows + 7) / 8, 256, 0, stream>>>(static_cast<const __nv_bfloat16*>(out), static_cast<const __nv_bfloat16*>(grad_out),
                                                    delta, rows);
    return cudaGetLastError();
}

int sparse_mla_backward(const void* q, const void* kv_permuted, const void* grad_out, const int* indices, const float* lse,
                        const float* delta, void* grad_q, float* grad_kv, int t, int h, int k, float scale, int store,
                        cudaStream_t stream) {
    const Arguments x{static_cast<const __nv_bfloat16*>(q), static_cast<const __nv_bfloat16*>(kv_permuted),
                      static_cast<const __nv_bfloat16*>(grad_out), indices, lse, delta, static_cast<__nv_bfloat16*>(grad_q), grad_kv,
                      t, h, k, scale};
    switch (store) {
        case kReduce: return launch<kReduce>(x, stream);
        case kDrop: return launch<kDrop>(x, stream);
        case kStage: return launch<kStage>(x, stream);
    }
    return cudaErrorInvalidValue;
}

int sparse_mla_count_keys(const int* indices, int64_t n, int* counts, cudaStream_t stream) {
    if (n) count_keys<<<(n + 255) / 256, 256, 0, stream>>>(indices, n, counts);
    return cudaGetLastError();
}

int sparse_mla_place_keys(const int* indices, int64_t n, int* next, int* order, cudaStream_t stream) {
    if (n) place_keys<<<(n + 255) / 256, 256, 0, stream>>>(indices, n, next, order);
    return cudaGetLastError();
}

int sparse_mla_sum_by_key(const void* staged, const int* order, const int* ends, float* grad_kv, int64_t keys, cudaStream_t stream) {
    if (keys) sum_by_key<<<keys, 4 * kDK / 8, 0, stream>>>(static_cast<const __nv_bfloat16*>(staged), order, ends, grad_kv);
    return cudaGetLastError();
}

}
