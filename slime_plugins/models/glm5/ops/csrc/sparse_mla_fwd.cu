// Forward of sparse MLA for Hopper: q [t, h, 576], latent KV [T, 576] (value = first 512 columns), indices [t, k] with -1 = no key
// -> out [t, h, 512] and the natural log-sum-exp lse [t, h]; zeros and -inf for a row without a key.
//
// As many blocks as multiprocessors; each takes one item after the other, a query and up to 64 of its heads, from a counter. Keys come in
// groups of 64, two groups in shared memory (a stage each):
//   warpgroup 0: S, softmax and P of the even groups, O columns   0..255 of all groups
//   warpgroup 1: S, softmax and P of the odd groups,  O columns 256..511 of all groups
//   warpgroup 2: fetches: the keys, Q, the next item's number, and how many of its groups have a key
// so that one warpgroup multiplies while the other does softmax, and the next item's first keys arrive while this one's O is stored. An item
// has an even number of groups, at least two; those behind its last key are left out, and a group without keys adds nothing.
//
// Both O take the groups in the order 0, 1, 2, ...: a warpgroup adds P V of the other's group b - 1 and then that of its own group b. So both
// see the same chain of scales: top(b) = top(b - 1), or the highest of group b if that is more than 8 (log2) above it; P(b) <= 2^8 is made with
// top(b) and comes with alpha(b) = 2^(top(b-1) - top(b)), by which O and the sums are multiplied before P(b) is added: rarely anything but 1.
// Warpgroup 0 waits for P(b - 1) before it starts S(b); warpgroup 1 starts S(b) first. (Both in one order, or what is ready first: slower.)
//
// Barriers in shared memory, one phase per pair of groups:
//   full(stage, region)   keys are there; region = columns 0..255, 256..511, rope. The owner of the group waits, before S
//   empty(stage, region)  may be overwritten: the warpgroup that reads it last is done (P V of the columns, S for the rope)
//   P(stage)              P and alpha of the group are there: the other warpgroup waits, before P V
// and one phase per item:
//   header (2 by turns)   number and pairs of the item are there; all who compute wait, before they store the O of the item before it
//   Q there               all who compute wait, before S
//   Q read                the last S of both warpgroups is done
// Two headers, since the next may be written before all have seen this one. The next but one may not: before it the next item's keys were
// fetched, into places that this item's readers gave back. No phase of any of these ends before all who wait for it have seen the one before.
// P and alpha take the places of those two groups before: their writer has then waited for full, hence for empty of the columns of the
// other warpgroup, which has read both by then. top(b) stands before P(b) does, and P(b + 1) keeps it from being overwritten; named barriers
// pass it on from warp to warp as well. The rope columns of Q lie in registers.
#include <type_traits>
#include "hopper.cuh"

using namespace hopper;

namespace {

constexpr int kDK = 576, kDV = 512, kHeads = 64, kKeys = 64, kThreads = 384, kConsumers = 256;
constexpr int kConsumerRegisters = 216, kProducerRegisters = 72;
constexpr float kSlack = 8.f, kLog2e = 1.4426950408889634f;
constexpr int kStageBytes = 9 * kTileBytes;
constexpr int kQ = 0, kPEven = 8 * kTileBytes, kK = 9 * kTileBytes, kPOdd = kK + 2 * kStageBytes;
constexpr int kTop = kPOdd + kTileBytes, kAlpha = kTop + 2 * kHeads * 4, kSum = kAlpha + 2 * kHeads * 4, kBarriers = kSum + 4 * kHeads * 4;
constexpr int kFull = kBarriers, kEmpty = kFull + 6 * 8, kPThere = kEmpty + 6 * 8, kQThere = kPThere + 2 * 8, kQRead = kQThere + 8;
constexpr int kHeaderThere = kQRead + 8, kHeader = kHeaderThere + 2 * 8, kLast = kHeader + 2 * 8, kNext = kLast + 8 * 4, kSharedBytes = kNext + 2 * 4;
static_assert(kSharedBytes <= 227 * 1024);
enum Region { kLeft, kRight, kRope };
constexpr int kTopBarrier = 1, kCopyBarrier = 9, kComputeBarrier = 10;  // kTopBarrier: 2 warpgroups x 4 warps

struct Arguments {
    const __nv_bfloat16 *q, *kv;
    const int* indices;
    __nv_bfloat16* out;
    float* lse;  // [t, h] natural
    int* taken;  // items taken beyond each block's first
    int h, k;
    float scale;
    int per_query, items;  // blocks of heads; of all queries
};

struct Header {
    int item, pairs;  // pairs of groups; item = the number of items: no more
};

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// v[i] of lane j of four neighbours becomes v[j] of lane i.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&v)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t from = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
        if (odd) v[i] = from;
        else v[i + 1] = from;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t from = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + 2], 2);
        if (upper) v[i] = from;
        else v[i + 2] = from;
    }
}

__device__ __forceinline__ uint32_t full_barrier(uint32_t base, int stage, int region) { return base + kFull + (stage * 3 + region) * 8; }
__device__ __forceinline__ uint32_t empty_barrier(uint32_t base, int stage, int region) { return base + kEmpty + (stage * 3 + region) * 8; }

template <int kSide>
__device__ __forceinline__ void compute(const Arguments& x, char* shared) {
    constexpr int kOther = 1 - kSide;
    constexpr int kOwnP = kSide ? kPOdd : kPEven, kOtherP = kSide ? kPEven : kPOdd;
    constexpr int kOwnStage = kK + kSide * kStageBytes, kOtherStage = kK + kOther * kStageBytes;
    const uint32_t base = smem_address(shared);
    const int lane = threadIdx.x & 31, warp = (threadIdx.x & 127) / 32, row = warp * 16 + lane / 4;
    const int matrix_row = warp * 16 + (lane & 15), matrix_unit = lane / 16;
    const float factor = x.scale * kLog2e;
    float* own_top = reinterpret_cast<float*>(shared + kTop) + kSide * kHeads + row;
    float* own_alpha = reinterpret_cast<float*>(shared + kAlpha) + kSide * kHeads + row;
    const float* other_top = reinterpret_cast<const float*>(shared + kTop) + kOther * kHeads + row;
    const float* other_alpha = reinterpret_cast<const float*>(shared + kAlpha) + kOther * kHeads + row;
    const uint64_t operands = operand(base);
    // Two ways to the same, of which this costs fewer instructions: 100 instead of 200 between the products of warpgroup 0.
    auto beyond = [](uint64_t from, int bytes) {
        if (kSide) return hopper::beyond(from, bytes);
        return static_cast<uint64_t>(static_cast<uint32_t>(from) + (bytes >> 4)) | static_cast<uint64_t>(0x40000040) << 32;
    };
    auto release = [&](int stage, int region) {  // behind the wait for the products that read it
        __syncwarp();
        if (lane == 0) mbarrier_arrive(empty_barrier(base, stage, region));
    };
    auto await_full = [&](int region, int parity) {
        mbarrier_wait(full_barrier(base, kSide, region), parity);
        publish_to_wgmma();  // for all who copied
    };

    int passed = 0, item, pairs;  // pairs of the items before, of this one
    uint32_t rope[16];  // the left operand
    auto next = [&](int n) {
        mbarrier_wait(base + kHeaderThere + (n & 1) * 8, n >> 1 & 1);
        const volatile Header* header = reinterpret_cast<const volatile Header*>(shared + kHeader) + (n & 1);
        item = header->item, pairs = header->pairs;
        if (item >= x.items) return;
        const int first_head = item % x.per_query * kHeads;
        const int64_t head_row = static_cast<int64_t>(item / x.per_query) * x.h + first_head + row;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int down = (i & 1) * 8, column = kDV + i / 4 * 16 + (i / 2 & 1) * 8 + (lane & 3) * 2;
            rope[i] = first_head + row + down < x.h ? __ldg(reinterpret_cast<const unsigned*>(x.q + (head_row + down) * kDK + column)) : 0u;
        }
    };
    next(0);
    for (int n = 0; item < x.items; ++n) {
        const int query = item / x.per_query, first_head = item % x.per_query * kHeads;
        const int* indices = x.indices + static_cast<int64_t>(query) * x.k;
        const int64_t head_row = static_cast<int64_t>(query) * x.h + first_head + row;

        float o[128], s[32], sum[2] = {0.f, 0.f};
        int key[2];
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] = 0.f;
        mbarrier_wait(base + kQThere, n & 1);

        auto rescale = [&](float low, float high) {
            if (__any_sync(0xffffffffu, low != 1.f || high != 1.f)) {
#pragma unroll
                for (int i = 0; i < 128; ++i) o[i] *= i & 2 ? high : low;
            }
        };
        auto start_s = [&](int pair, int parity) {
            await_full(kRope, parity);
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                mma64_left_in_registers(s, rope + step * 4, beyond(operands, kOwnStage + 8 * kTileBytes + step * 32), step > 0);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int side = part ^ kSide;  // what is emptied and fetched first comes first
                await_full(side, parity);
                wgmma_begin();
#pragma unroll
                for (int step = side * 16; step < side * 16 + 16; ++step) {
                    const int at = step / 4 * kTileBytes + step % 4 * 32;
                    mma64<0, 0>(s, beyond(operands, kQ + at), beyond(operands, kOwnStage + at), true);
                }
            }
            wgmma_commit();
#pragma unroll
            for (int i = 0; i < 2; ++i) {  // behind the fences, which would wait for it
                const int at = (pair * 2 + kSide) * kKeys + i * 32 + lane;
                key[i] = at < x.k ? __ldg(indices + at) : -1;
            }
        };
        auto start_other_pv = [&](int parity) {
            mbarrier_wait(base + kPThere + kOther * 8, parity);
            const float low = other_alpha[0], high = other_alpha[8];
            rescale(low, high);
            sum[0] *= low, sum[1] *= high;
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                mma256<0, 1>(o, beyond(operands, kOtherP + step * 32), beyond(operands, kOtherStage + kSide * 4 * kTileBytes + step * 2048), true);
            wgmma_commit();
        };

        // This warpgroup's group of a pair; before its P V that of the other's group before it, if there is one.
        auto own_group = [&](int pair, auto behind_other) {
            constexpr bool kBehindOther = decltype(behind_other)::value;
            const int parity = (passed + pair) & 1, other_parity = kSide ? parity : parity ^ 1;
            if (kSide) {
                start_s(pair, parity);
                start_other_pv(other_parity);
                wgmma_wait<1>();
            } else {
                if (kBehindOther) start_other_pv(other_parity);
                start_s(pair, parity);
                if (kBehindOther) {
                    wgmma_wait<1>();
                    settle(o);
                    release(kOther, kSide);
                }
                wgmma_wait<0>();
            }
            settle(s);
            release(kSide, kRope);
            if (lane == 0 && pair + 1 == pairs) mbarrier_arrive(base + kQRead);

            const unsigned there[2] = {__ballot_sync(0xffffffffu, key[0] >= 0) >> ((lane & 3) * 2),
                                       __ballot_sync(0xffffffffu, key[1] >= 0) >> ((lane & 3) * 2)};
            float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const int column = i / 4 * 8 + (i & 1), half = i / 2 & 1;
                s[i] = there[column / 32] >> (column & 31) & 1 ? s[i] * factor : -INFINITY;
                highest[half] = fmaxf(highest[half], s[i]);
            }
            highest[0] = quad_max(highest[0]), highest[1] = quad_max(highest[1]);
            if (kBehindOther) barrier_sync(kTopBarrier + kOther * 4 + warp, 64);
            float alpha[2], shift[2], part[2] = {0.f, 0.f};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float before = kBehindOther ? other_top[half * 8] : -INFINITY;
                const float top = highest[half] > before + kSlack ? highest[half] : before;  // also the first time: before is -inf
                shift[half] = top == -INFINITY ? 0.f : top;
                alpha[half] = before == top ? 1.f : exp2_of(before - shift[half]);
                if ((lane & 3) == 0) own_top[half * 8] = top, own_alpha[half * 8] = alpha[half];
            }
            if (kSide == 0 || pair + 1 < pairs) barrier_arrive(kTopBarrier + kSide * 4 + warp, 64);
            uint32_t p[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int half = i & 1;
                const float a = exp2_of(s[i * 2] - shift[half]), c = exp2_of(s[i * 2 + 1] - shift[half]);
                part[half] += a + c;
                p[i] = pack(a, c);
            }
            sum[0] = sum[0] * alpha[0] + part[0], sum[1] = sum[1] * alpha[1] + part[1];
#pragma unroll
            for (int step = 0; step < 4; ++step)
                store_matrices(base + kOwnP + swizzled(matrix_row, step * 2 + matrix_unit), p[step * 4], p[step * 4 + 1], p[step * 4 + 2], p[step * 4 + 3]);
            publish_to_wgmma();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(base + kPThere + kSide * 8);
            if (kSide) {
                wgmma_wait<0>();
                settle(o);
                release(kOther, kSide);
            }
            rescale(alpha[0], alpha[1]);
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                mma256_left_in_registers<1>(o, p + step * 4, beyond(operands, kOwnStage + kSide * 4 * kTileBytes + step * 2048));
            wgmma_commit();
            wgmma_wait<0>();
            settle(o);
            release(kSide, kSide);
        };

        if (kSide == 0) own_group(0, std::false_type());
        for (int pair = kSide ? 0 : 1; pair < pairs; ++pair) own_group(pair, std::true_type());
        if (kSide == 0) {
            start_other_pv((passed + pairs - 1) & 1);
            wgmma_wait<0>();
            settle(o);
            release(kOther, kSide);
        }
        passed += pairs;
        next(n + 1);

        float* sums = reinterpret_cast<float*>(shared + kSum) + (n & 1) * 2 * kHeads + row;  // by turns
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] = quad_sum(sum[half]);
            if ((lane & 3) == 0) sums[kSide * kHeads + half * 8] = sum[half];
        }
        barrier_sync(kComputeBarrier, kConsumers);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool real = first_head + row + half * 8 < x.h;
            const int64_t at = head_row + half * 8;
            const float whole = sum[half] + sums[kOther * kHeads + half * 8], inverse = whole > 0.f ? 1.f / whole : 0.f;
            if (kSide == 0 && real && (lane & 3) == 0)  // the top of the last group, an odd one
                x.lse[at] = whole > 0.f ? (other_top[half * 8] + log2f(whole)) / kLog2e : -INFINITY;
            __nv_bfloat16* out = x.out + at * kDV + kSide * 256 + (lane & 3) * 8;
#pragma unroll
            for (int j = 0; j < 32; j += 4) {  // 16 bytes per lane
                uint32_t v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] = pack(o[(j + i) * 4 + half * 2] * inverse, o[(j + i) * 4 + half * 2 + 1] * inverse);
                transpose_in_quad(v, lane);
                if (real) *reinterpret_cast<uint4*>(out + j * 8) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        }
    }
}

__device__ __forceinline__ void fetch(const Arguments& x, char* shared) {
    const uint32_t base = smem_address(shared);
    const int in_group = threadIdx.x & 127, copy_row = in_group / 8, unit = in_group & 7;
    int* last = reinterpret_cast<int*>(shared + kLast);  // of each warp, by turns
    int* next_item = reinterpret_cast<int*>(shared + kNext);
    auto list_of = [&](int item) { return x.indices + static_cast<int64_t>(item / x.per_query) * x.k; };
    int key[4];
    auto look_up = [&](const int* list, int at) {  // of 64 keys; -1 behind the end
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int mine = at + copy_row + i * 16;
            key[i] = mine < x.k ? __ldg(list + mine) : -1;
        }
    };

    int item = blockIdx.x, passed = 0, after = 0;
    const int* list = list_of(item);
    look_up(list, 0);
    if (in_group == 0) after = gridDim.x + atomicAdd(x.taken, 1);
    int mine = -1;  // the last place with a key, of those that this thread has looked at
    for (int at = in_group; at < x.k; at += 128)
        if (__ldg(list + at) >= 0) mine = at;
    for (int n = 0;; ++n) {
        mine = __reduce_max_sync(0xffffffffu, mine);
        if ((in_group & 31) == 0) last[(n & 1) * 4 + in_group / 32] = mine;
        if (in_group == 0) next_item[n & 1] = after;
        barrier_sync(kCopyBarrier, 128);
        const int* lasts = last + (n & 1) * 4;
        const int top = max(max(lasts[0], lasts[1]), max(lasts[2], lasts[3])), pairs = top < 0 ? 1 : top / (2 * kKeys) + 1;
        const int next = next_item[n & 1];
        const bool more = next < x.items;
        if (in_group == 0 && more) after = gridDim.x + atomicAdd(x.taken, 1);

        if (in_group == 0) {  // the one of two items ago has been read: the last item's keys went where that one's were given back
            volatile Header* header = reinterpret_cast<volatile Header*>(shared + kHeader) + (n & 1);
            header->item = item, header->pairs = pairs;
            mbarrier_arrive(base + kHeaderThere + (n & 1) * 8);
        }
        if (item >= x.items) break;

        const int first_head = item % x.per_query * kHeads, rows = min(kHeads, x.h - first_head);
        const __nv_bfloat16* q = x.q + (static_cast<int64_t>(item / x.per_query) * x.h + first_head) * kDK;
        mbarrier_wait(base + kQRead, (n & 1) ^ 1);
#pragma unroll 4
        for (int i = 0; i < 32; ++i) {
            const int r = copy_row + i / 8 * 16, tile = i & 7;
            copy16_async(base + kQ + tile * kTileBytes + swizzled(r, unit), q + static_cast<int64_t>(r < rows ? r : 0) * kDK + tile * 64 + unit * 8,
                         r < rows);
        }
        mbarrier_arrive_after_copies(base + kQThere);

        const int* next_list = more ? list_of(next) : list;
        auto fetch_group = [&](int pair, auto of_pair) {
            constexpr int kStage = decltype(of_pair)::value;
            const int parity = (passed + pair + 1) & 1;
            const uint32_t to = base + kK + kStage * kStageBytes + swizzled(copy_row, unit);  // rows 16 apart: the same place in the tile
            const char* source[4];
            bool real[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                real[i] = key[i] >= 0;
                source[i] = reinterpret_cast<const char*>(x.kv) + static_cast<int64_t>(max(key[i], 0)) * (kDK * 2) + unit * 16;
            }
            const bool to_next = kStage == 1 && pair + 1 == pairs;
            look_up(to_next ? next_list : list, to_next ? 0 : (pair * 2 + kStage + 1) * kKeys);
            mbarrier_wait(empty_barrier(base, kStage, kRope), parity);
#pragma unroll
            for (int i = 0; i < 4; ++i) copy16_async(to + 8 * kTileBytes + i * 2048, source[i] + 1024, real[i]);
            mbarrier_arrive_after_copies(full_barrier(base, kStage, kRope));
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int side = part ^ kStage;  // its owner's columns are emptied first
                mbarrier_wait(empty_barrier(base, kStage, side), parity);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int tile = 0; tile < 4; ++tile)
                        copy16_async(to + (side * 4 + tile) * kTileBytes + i * 2048, source[i] + side * 512 + tile * 128, real[i]);
                }
                mbarrier_arrive_after_copies(full_barrier(base, kStage, side));
            }
        };
        mine = -1;
        for (int pair = 0; pair < pairs; ++pair) {
            const int at = pair * 128 + in_group, seen = more && at < x.k ? __ldg(next_list + at) : -1;
            fetch_group(pair, std::integral_constant<int, 0>());
            fetch_group(pair, std::integral_constant<int, 1>());
            if (seen >= 0) mine = at;
        }
        if (more)
            for (int at = pairs * 128 + in_group; at < x.k; at += 128)
                if (__ldg(next_list + at) >= 0) mine = at;
        passed += pairs, item = next, list = next_list;
    }
    copies_wait<0>();
}

__global__ void __launch_bounds__(kThreads, 1) forward(const Arguments x) {
    extern __shared__ __align__(1024) char shared[];
    const uint32_t base = smem_address(shared);
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 6; ++i) mbarrier_init(base + kFull + i * 8, 128), mbarrier_init(base + kEmpty + i * 8, 4);
        mbarrier_init(base + kPThere, 4), mbarrier_init(base + kPThere + 8, 4);
        mbarrier_init(base + kQThere, 128), mbarrier_init(base + kQRead, 8);
        mbarrier_init(base + kHeaderThere, 1), mbarrier_init(base + kHeaderThere + 8, 1);
        mbarrier_publish_init();
    }
    __syncthreads();
    if (warpgroup == 2) {
        give_registers<kProducerRegisters>();
        fetch(x, shared);
    } else {
        take_registers<kConsumerRegisters>();
        if (warpgroup == 0) compute<0>(x, shared);
        else compute<1>(x, shared);
    }
}

}  // namespace

// taken: one int for this call alone.
extern "C" int sparse_mla_forward(const void* q, const void* kv, const int* indices, void* out, float* lse, int* taken, int t, int h, int k,
                                  float scale, cudaStream_t stream) {
    if (t == 0 || h == 0) return cudaSuccess;
    int device, processors;
    cudaError_t error = cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaMemsetAsync(taken, 0, sizeof(int), stream);
    if (error != cudaSuccess) return error;
    const int per_query = (h + kHeads - 1) / kHeads, items = t * per_query;
    const Arguments x{static_cast<const __nv_bfloat16*>(q), static_cast<const __nv_bfloat16*>(kv), indices,
                      static_cast<__nv_bfloat16*>(out), lse, taken, h, k, scale, per_query, items};
    forward<<<min(items, processors), kThreads, kSharedBytes, stream>>>(x);
    return cudaGetLastError();
}
