// Backward of sparse MLA for Hopper: q [t, h, 576], latent KV [T, 576] (value = first 512 columns), indices [t, k] with -1 = no key.
//
// One block works on one query and up to 64 of its heads; keys come in groups of 64. Shared memory (224 KB) holds Q [64, 576],
// dO [64, 512], the gathered keys K [64, 576], and P and dS [64 heads, 64 keys] in bf16.
//   warpgroup 0:  S = Q K'      P  = e^(scale S - lse)
//   warpgroup 1:  dP = dO V'    dS = scale P (dP - delta)
//   both, each on its own columns (0..255 | 256..575):
//                 dQ += dS K    (kept in registers over all keys of the query)
//                 dKV = dS' Q + P' dO   (added to global memory in float32)
// The next keys are fetched while dKV, which does not need K, is computed.
//
// Within each 16 columns of Q, dO and K the pairs are stored in the order 0 2 4 6 1 3 5 7 (sums over columns do not care). A thread's
// accumulators of two neighbouring 8-column groups are then 4 consecutive columns of the result: one 16-byte reduction.
#include "hopper.cuh"

using namespace hopper;

namespace {

constexpr int kDK = 576, kDV = 512, kHeads = 64, kKeys = 64;
constexpr int kQ = 0, kDO = kQ + 9 * kTileBytes, kK = kDO + 8 * kTileBytes, kP = kK + 9 * kTileBytes, kDS = kP + kTileBytes;
constexpr int kIndex = kDS + kTileBytes, kSharedBytes = kIndex + 2 * kKeys * 4;

enum Store { kReduce = 0, kDrop = 1, kStage32 = 2, kStage16 = 3 };

// 16 columns (32 bytes), pairs 0..7 -> 0 2 4 6 | 1 3 5 7.
__device__ __forceinline__ void permute16(uint4& low, uint4& high) {
    uint4 a = {low.x, low.z, high.x, high.z}, b = {low.y, low.w, high.y, high.w};
    low = a, high = b;
}

__device__ __forceinline__ void load_rows(char* to, const __nv_bfloat16* from, int rows, int columns) {
    const int pieces = columns / 16;
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

__device__ __forceinline__ void reduce4(float* to, float a, float b, float c, float d) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// d: kColumns/2 accumulators of a warpgroup for 64 keys x kColumns columns, from `column` on.
template <int kStore, int kRegisters>
__device__ __forceinline__ void put_keys(const float (&d)[kRegisters], float* grad_kv, int key_low, int key_high, int64_t slot,
                                         int column, int row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = half ? key_high : key_low;
        if (key < 0) continue;
        const int64_t at = kStore == kReduce ? key : slot + row + half * 8;
#pragma unroll
        for (int m = 0; m < kRegisters / 8; ++m) {
            const int i = m * 8 + half * 2;
            const int64_t offset = at * kDK + column + m * 16 + (lane & 3) * 4;
            if constexpr (kStore == kReduce) {
                reduce4(grad_kv + offset, d[i], d[i + 1], d[i + 4], d[i + 5]);
            } else if constexpr (kStore == kStage32) {
                *reinterpret_cast<float4*>(grad_kv + offset) = {d[i], d[i + 1], d[i + 4], d[i + 5]};
            } else if constexpr (kStore == kStage16) {
                __nv_bfloat162 low = __floats2bfloat162_rn(d[i], d[i + 1]), high = __floats2bfloat162_rn(d[i + 4], d[i + 5]);
                uint2 both = {reinterpret_cast<uint32_t&>(low), reinterpret_cast<uint32_t&>(high)};
                *reinterpret_cast<uint2*>(reinterpret_cast<__nv_bfloat16*>(grad_kv) + offset) = both;
            } else {
                if (d[i] == 12345.678f) grad_kv[0] = d[i + 1] + d[i + 4] + d[i + 5];  // keeps the product alive in timing runs
            }
        }
    }
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

// dKV of kTiles x 64 columns from tile `tile` on. The last tile (rope) has no value part.
template <int kStore, int kTiles, bool kValue>
__device__ __forceinline__ void keys_gradient(uint32_t base, int tile, float* grad_kv, int key_low, int key_high, int64_t slot, int row,
                                              int lane) {
    float d[kTiles * 32];
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const uint64_t a = operand(base + kDS + step * 2048), b = operand(base + kQ + tile * kTileBytes + step * 2048);
        if constexpr (kTiles == 2) mma128<1, 1>(d, a, b, step > 0);
        else mma64<1, 1>(d, a, b, step > 0);
    }
    if constexpr (kValue) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint64_t a = operand(base + kP + step * 2048), b = operand(base + kDO + tile * kTileBytes + step * 2048);
            if constexpr (kTiles == 2) mma128<1, 1>(d, a, b, true);
            else mma64<1, 1>(d, a, b, true);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    put_keys<kStore>(d, grad_kv, key_low, key_high, slot, tile * 64, row, lane);
}

struct Arguments {
    const __nv_bfloat16 *q, *kv_permuted, *grad_out;
    const int* indices;
    const float *lse, *delta;  // [t, h]; lse natural
    __nv_bfloat16* grad_q;
    float* grad_kv;  // [T, 576], or [t * k, 576] contributions when staging
    int t, h, k;
    float scale;
};

template <int kStore>
__global__ void __launch_bounds__(256, 1) backward(const Arguments x) {
    extern __shared__ __align__(1024) char shared[];
    const uint32_t base = smem_address(shared);
    const int query = blockIdx.x, first_head = blockIdx.y * kHeads, rows = min(kHeads, x.h - first_head);
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x & 31, row = (threadIdx.x & 127) / 32 * 16 + lane / 4;
    const int64_t head_row = static_cast<int64_t>(query) * x.h + first_head;
    const int* indices = x.indices + static_cast<int64_t>(query) * x.k;
    const int blocks = (x.k + kKeys - 1) / kKeys;
    constexpr float kLog2e = 1.4426950408889634f;

    // Gather: 8 threads fetch one 128-byte row of a tile; a thread serves rows copy_row and copy_row + 32 of all 9 tiles.
    const int copy_row = threadIdx.x / 8, unit = threadIdx.x & 7;
    auto index_at = [&](int block, int r) {
        const int at = block * kKeys + r;
        return block < blocks && at < x.k ? __ldg(indices + at) : -1;
    };
    int low = index_at(0, copy_row), high = index_at(0, copy_row + 32);
    auto fetch = [&](int block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = half ? high : low, r = copy_row + half * 32;
            const char* source = reinterpret_cast<const char*>(x.kv_permuted + static_cast<int64_t>(max(key, 0)) * kDK) + unit * 16;
            const uint32_t to = base + kK + swizzled(r, unit);
#pragma unroll
            for (int tile = 0; tile < 9; ++tile) copy16_async(to + tile * kTileBytes, source + tile * 128, key >= 0);
            if (unit == 0) reinterpret_cast<int*>(shared + kIndex)[(block & 1) * kKeys + r] = key;
        }
        copies_commit();
    };

    fetch(0);
    load_rows(shared + kQ, x.q + head_row * kDK, rows, kDK);
    load_rows(shared + kDO, x.grad_out + head_row * kDV, rows, kDV);
    float of_row[2];  // warpgroup 0: lse in log2 units; warpgroup 1: delta
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int head = row + half * 8;
        const float* from = warpgroup == 0 ? x.lse : x.delta;
        // A head that does not exist: lse = inf makes every probability 0.
        of_row[half] = head < rows ? from[head_row + head] : (warpgroup == 0 ? __int_as_float(0x7f800000) : 0.f);
        if (warpgroup == 0) of_row[half] *= kLog2e;
    }

    float dq[128], dq_rope[32];
#pragma unroll
    for (int i = 0; i < 128; ++i) dq[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) dq_rope[i] = 0.f;

    for (int block = 0; block < blocks; ++block) {
        copies_wait<0>();
        publish_to_wgmma();
        const bool any = __syncthreads_or(low >= 0 || high >= 0);
        low = index_at(block + 1, copy_row), high = index_at(block + 1, copy_row + 32);
        if (!any) {
            if (block + 1 < blocks) fetch(block + 1);
            continue;
        }
        const int* keys = reinterpret_cast<const int*>(shared + kIndex) + (block & 1) * kKeys;
        const int key_low = keys[row], key_high = keys[row + 8];

        float s[32];
        if (warpgroup == 0) {
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 36; ++step) {
                const int at = step / 4 * kTileBytes + step % 4 * 32;
                mma64<0, 0>(s, operand(base + kQ + at), operand(base + kK + at), step > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            const float factor = x.scale * kLog2e;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int2 key = *reinterpret_cast<const int2*>(keys + j * 8 + (lane & 3) * 2);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float a = key.x < 0 ? 0.f : exp2f(fmaf(s[j * 4 + half * 2], factor, -of_row[half]));
                    const float b = key.y < 0 ? 0.f : exp2f(fmaf(s[j * 4 + half * 2 + 1], factor, -of_row[half]));
                    *reinterpret_cast<__nv_bfloat162*>(shared + kP + swizzled(row + half * 8, j) + (lane & 3) * 4) =
                        __floats2bfloat162_rn(a, b);
                }
            }
            publish_to_wgmma();
            barrier_arrive(1, 256);
        } else {
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 32; ++step) {
                const int at = step / 4 * kTileBytes + step % 4 * 32;
                mma64<0, 0>(s, operand(base + kDO + at), operand(base + kK + at), step > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            barrier_sync(1, 256);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = swizzled(row + half * 8, j) + (lane & 3) * 4;
                    const float2 p = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(shared + kP + at));
                    *reinterpret_cast<__nv_bfloat162*>(shared + kDS + at) =
                        __floats2bfloat162_rn(p.x * (s[j * 4 + half * 2] - of_row[half]) * x.scale,
                                              p.y * (s[j * 4 + half * 2 + 1] - of_row[half]) * x.scale);
                }
            }
            publish_to_wgmma();
        }
        barrier_sync(2, 256);

        const int first_tile = warpgroup * 4;
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            mma256<0, 1>(dq, operand(base + kDS + step * 32), operand(base + kK + first_tile * kTileBytes + step * 2048), true);
        if (warpgroup == 1) {
#pragma unroll
            for (int step = 0; step < 4; ++step)
                mma64<0, 1>(dq_rope, operand(base + kDS + step * 32), operand(base + kK + 8 * kTileBytes + step * 2048), true);
        }
        wgmma_commit();
        wgmma_wait<0>();
        __syncthreads();
        if (block + 1 < blocks) fetch(block + 1);

        const int64_t slot = static_cast<int64_t>(query) * x.k + block * kKeys;
        keys_gradient<kStore, 2, true>(base, first_tile, x.grad_kv, key_low, key_high, slot, row, lane);
        keys_gradient<kStore, 2, true>(base, first_tile + 2, x.grad_kv, key_low, key_high, slot, row, lane);
        if (warpgroup == 1) keys_gradient<kStore, 1, false>(base, 8, x.grad_kv, key_low, key_high, slot, row, lane);
    }
    copies_wait<0>();
    __nv_bfloat16* grad_q = x.grad_q + head_row * kDK;
    put_query(dq, grad_q, rows, warpgroup * 256, row, lane);
    if (warpgroup == 1) put_query(dq_rope, grad_q, rows, kDV, row, lane);
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

// grad_kv[key] += contributions of that key in the order of `order` (positions sorted by key, stable): one block per key, no atomics.
template <typename Element>
__global__ void sum_by_key(const Element* staged, const int64_t* order, const int64_t* begins, float* grad_kv, int64_t keys) {
    const int64_t key = blockIdx.x;
    const int64_t begin = begins[key], end = begins[key + 1];
    if (begin == end) return;
    for (int column = threadIdx.x; column < kDK; column += blockDim.x) {
        float sum = grad_kv[key * kDK + column];
        for (int64_t i = begin; i < end; ++i) sum += static_cast<float>(staged[order[i] * kDK + column]);
        grad_kv[key * kDK + column] = sum;
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
        case kStage32: return launch<kStage32>(x, stream);
        case kStage16: return launch<kStage16>(x, stream);
    }
    return cudaErrorInvalidValue;
}

int sparse_mla_sum_by_key(const void* staged, int bits, const int64_t* order, const int64_t* begins, float* grad_kv, int64_t keys,
                          cudaStream_t stream) {
    if (keys == 0) return cudaSuccess;
    if (bits == 32) sum_by_key<<<keys, 192, 0, stream>>>(static_cast<const float*>(staged), order, begins, grad_kv, keys);
    else sum_by_key<<<keys, 192, 0, stream>>>(static_cast<const __nv_bfloat16*>(staged), order, begins, grad_kv, keys);
    return cudaGetLastError();
}

}
