// The indexer for Hopper: score[i, j] = key_scale_j * sum over 32 heads of gate[i, h] * relu(q[i, h] . k[j]), then the top-k of each row.
//
// In:  q [t, 32, 128] and k [T, 128] in bf16, or both as e4m3 codes, with q's scale folded into the gates and k's in key_scale [T];
//      gates [t, 32] float32. Row i looks at the keys starts[i] .. ends[i] - 1.
// Out: picked [t, topk] int32, positions ascending, -1 behind the last; of equal scores the lowest positions win.
// Between the two kernels: scores [t, stride] float32. The caller gives as many rows at a time as its workspace holds (hopper_ops._index_topk).
//
// scores: one block holds 8 queries (8 x 32 heads = 256 columns of the product) and walks through keys; each of its two warpgroups takes
// 64 keys at a time from its own ring of shared-memory stages. The product is computed in two halves of 4 queries: while the sums over
// heads of one half run, the other half's product does. Keys are the rows of the product and the queries' rows are so ordered that all heads
// of a query lie in one thread's registers: a sum over heads needs no exchange between threads.
// select_topk: one block per row. A sixteenth of the scores, counted by their upper 13 bits, tells above which value there are about 1.6
// times as many as are wanted; one reading lists these, in key order, and the rest happens on that list in shared memory. Where the
// sample misled (too few listed, or more than there is room for), and for short rows, the counts are of all scores: a second reading. (Scores so
// alike that this list overflows too are read three more times instead.)
#include "hopper.cuh"

using namespace hopper;

namespace {

constexpr int kHeads = 32, kDim = 128, kQueries = 8, kGroupKeys = 64, kGroups = 2, kStages = 4;

template <bool kFp8>
struct Shape {
    static constexpr int kRowBytes = kFp8 ? kDim : 2 * kDim;
    static constexpr int kRowTiles = kRowBytes / 128;              // 128-byte columns
    static constexpr int kStageBytes = kRowTiles * kTileBytes;     // 64 keys
    static constexpr int kQueryBytes = 4 * kRowTiles * kTileBytes;  // 256 rows: [column tile][4 x 64 rows]
    static constexpr int kZero = kQueryBytes + kGroups * kStages * kStageBytes, kSharedBytes = kZero + 16;
};

struct ScoreArguments {
    const void *q, *k;
    const float *gates, *key_scale;  // [t, 32]; [T] or null
    const int *starts, *ends;        // [t]
    float* scores;                   // [t, stride], column j is key j
    int t, chunk;
    int64_t keys, stride;
};

__device__ __forceinline__ float read_zero(uint32_t at) {
    float v;
    asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}

// Predicated, not branched around: the branch would take the sums with it and tear the two halves apart.
__device__ __forceinline__ void store_if(bool there, float* to, float v) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.global.f32 [%0], %1;\n}\n" ::"l"(to), "f"(v), "r"(static_cast<int>(there)) : "memory");
}

template <bool kFp8>
__global__ void __launch_bounds__(kGroups * 128, 1) score(const ScoreArguments x) {
    using S = Shape<kFp8>;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t base = smem_address(shared);
    const int first_query = blockIdx.x * kQueries, queries = min(kQueries, x.t - first_query);
    const int group = threadIdx.x / 128, in_group = threadIdx.x & 127, lane = threadIdx.x & 31;

    int64_t low = x.keys, high = 0;
    for (int i = 0; i < queries; ++i) {
        const int start = __ldg(x.starts + first_query + i), end = __ldg(x.ends + first_query + i);
        if (start < end) low = min(low, static_cast<int64_t>(start)), high = max(high, static_cast<int64_t>(end));
    }
    const int64_t chunk_begin = static_cast<int64_t>(blockIdx.y) * x.chunk;
    low = max(low, chunk_begin) & ~static_cast<int64_t>(kGroupKeys - 1);
    high = min(high, chunk_begin + x.chunk);
    if (low >= high) return;
    const int tiles = static_cast<int>((high - low + kGroupKeys - 1) / kGroupKeys);

    const int copy_row = in_group / 8, unit = in_group & 7;
    const uint32_t ring = base + S::kQueryBytes + group * kStages * S::kStageBytes;
    const uint32_t copy_to = ring + swizzled(copy_row, unit);  // rows 16 apart have the same swizzle
    const char* const copy_from = static_cast<const char*>(x.k) + (low + copy_row) * S::kRowBytes + unit * 16;
    constexpr int kTileStep = kGroupKeys * S::kRowBytes;
    const int rows_there = static_cast<int>(min(x.keys - low, static_cast<int64_t>(tiles + 1) * kGroupKeys));
    auto fetch = [&](int tile, int stage, const char* from) {
        const uint32_t to = copy_to + stage * S::kStageBytes;
        if ((tile + 1) * kGroupKeys <= rows_there) {
#pragma unroll
            for (int r = 0; r < kGroupKeys; r += 16)
#pragma unroll
                for (int column = 0; column < S::kRowTiles; ++column)
                    copy16_async(to + column * kTileBytes + r * 128, from + r * S::kRowBytes + column * 128, true);
        } else if (tile < tiles) {
#pragma unroll
            for (int r = 0; r < kGroupKeys; r += 16) {
                const bool real = tile * kGroupKeys + copy_row + r < rows_there;
#pragma unroll
                for (int column = 0; column < S::kRowTiles; ++column)
                    copy16_async(to + column * kTileBytes + r * 128, real ? from + r * S::kRowBytes + column * 128 : x.k, real);
            }
        }
        copies_commit();
    };
    const char* q = static_cast<const char*>(x.q) + static_cast<int64_t>(first_query) * kHeads * S::kRowBytes;
    for (int i = threadIdx.x; i < 256 * S::kRowTiles * 8; i += kGroups * 128) {
        const int r = i / (S::kRowTiles * 8), column = i / 8 % S::kRowTiles, u = i & 7;
        const int query = r / 128 * 4 + r / 2 % 4, head = r % 128 / 8 * 2 + r % 2;
        const bool real = query < queries;
        copy16_async(base + (column * 4 + r / 64) * kTileBytes + swizzled(r & 63, u),
                     q + (real ? query * kHeads + head : 0) * S::kRowBytes + column * 128 + u * 16, real);
    }
    copies_commit();
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage)
        fetch(group + stage * kGroups, stage, copy_from + (group + stage * kGroups) * kTileStep);

    // Column 8 j + 2 l + e of product p is head 2 j + e of query 4 p + l: the thread with lane % 4 = l has all heads of that query.
    float half_gate[2][kHeads];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        const int query = p * 4 + (lane & 3);
#pragma unroll
        for (int i = 0; i < kHeads; i += 4) {
            float4 g = {0.f, 0.f, 0.f, 0.f};
            if (query < queries)
                g = __ldg(reinterpret_cast<const float4*>(x.gates + static_cast<int64_t>(first_query + query) * kHeads + i));
            half_gate[p][i] = 0.5f * g.x, half_gate[p][i + 1] = 0.5f * g.y, half_gate[p][i + 2] = 0.5f * g.z, half_gate[p][i + 3] = 0.5f * g.w;
        }
    }
    if (threadIdx.x == 0) *reinterpret_cast<float*>(shared + S::kZero) = 0.f;
    copies_wait<kStages - 2>();  // the queries and the first tile
    publish_to_wgmma();
    __syncthreads();

    const int row = in_group / 32 * 16 + lane / 4;
    const uint32_t zero_at = base + S::kZero;
    const uint64_t keys_operand = operand(ring), queries_operand = operand(base);
    auto product = [&](float(&d)[64], int stage, int p) {
        const uint64_t keys_at = beyond(keys_operand, stage * S::kStageBytes);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < S::kRowTiles * 4; ++step) {
            const int column = step / 4, within = step % 4 * 32;
            const uint64_t a = beyond(keys_at, column * kTileBytes + within);
            const uint64_t b = beyond(queries_operand, (column * 4 + p * 2) * kTileBytes + within);
            if constexpr (kFp8) mma128_fp8(d, a, b, step > 0);
            else mma128<0, 0>(d, a, b, step > 0);
        }
        wgmma_commit();
    };
    float* to = x.scores + (first_query + (lane & 3)) * x.stride + low + row + group * kGroupKeys;
    const int64_t four_rows = 4 * x.stride;
    const bool mine[2] = {(lane & 3) < queries, 4 + (lane & 3) < queries};
    auto sum_heads = [&](const float(&d)[64], int p, float start, const bool(&there)[2], const float(&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // gate * relu(x) = gate / 2 * x + gate / 2 * |x|: two multiply-adds, which run at twice the rate of a maximum. In sums of
            // their own, so that they cancel exactly where no x is positive.
            float plain[2] = {start, start}, absolute[2] = {start, start};
#pragma unroll
            for (int i = 0; i < kHeads; ++i) {
                const float v = d[i / 2 * 4 + half * 2 + (i & 1)];
                plain[i & 1] = fmaf(half_gate[p][i], v, plain[i & 1]);
                absolute[i & 1] = fmaf(half_gate[p][i], fabsf(v), absolute[i & 1]);
            }
            const float total = (plain[0] + plain[1]) + (absolute[0] + absolute[1]);
            store_if(mine[p] && there[half], to + p * four_rows + half * 8, kFp8 ? total * factor[half] : total);
        }
    };
    // The warpgroups take turns at issuing products: left alone they would run in step, both in the matrix product, then both in the sums.
    const int keys_here = static_cast<int>(high - low);
    const float* scale_from = x.key_scale + low + row + group * kGroupKeys;
    const char* next_from = copy_from + (group + (kStages - 1) * kGroups) * kTileStep;
    int stage = 0, keys_left = keys_here - row - group * kGroupKeys;  // from this thread's lower key on
    const int my_turn = kGroups + 1 + group, your_turn = kGroups + 2 - group;
    if (group == 1) barrier_arrive(your_turn, 256);
    for (int tile = group; tile - group < tiles; tile += kGroups) {  // as many turns for both; a tile too many is computed, not stored
        float first[64], second[64], factor[2] = {1.f, 1.f};
        bool there[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // before the product: its latency covers that of the scales
            there[half] = half * 8 < keys_left;
            if constexpr (kFp8) factor[half] = there[half] ? __ldg(scale_from + half * 8) : 0.f;
        }
        if constexpr (kFp8) scale_from += kGroups * kGroupKeys;
        keys_left -= kGroups * kGroupKeys;
        barrier_sync(my_turn, 256);
        product(first, stage, 0);
        product(second, stage, 1);
        copies_wait<kStages - 3>();  // the next tile. The fence waits for this thread's stores too: here that costs nothing
        publish_to_wgmma();
        wgmma_wait<1>();
        barrier_arrive(your_turn, 256);
        settle(first);
        // A zero from shared memory: loads stay behind the signal, so the sums that start from it do. The compiler would put them first.
        sum_heads(first, 0, read_zero(zero_at), there, factor);
        wgmma_wait<0>();
        settle(second);
        barrier_sync(group + 1, 128);  // the next tile is there for all; this one is no longer read
        fetch(tile + (kStages - 1) * kGroups, (stage + kStages - 1) % kStages, next_from);
        next_from += kGroups * kTileStep;
        stage = (stage + 1) % kStages;
        sum_heads(second, 1, 0.f, there, factor);
        to += kGroups * kGroupKeys;
    }
    if (group == 0) barrier_sync(my_turn, 256);  // the other's last signal
    copies_wait<0>();
}

constexpr int kThreads = 512, kBins = 8192, kListed = 6144;
static_assert(kThreads / 32 <= 16, "list_from keeps two steps' counts per warp in 32 places");

// Larger float -> larger unsigned; -0 and 0 are one value.
__device__ __forceinline__ uint32_t ordered(float f) {
    const uint32_t bits = __float_as_uint(f + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The float that `u` came from.
__device__ __forceinline__ float from_ordered(uint32_t u) { return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u); }

// Inclusive prefix sum over the block; *total gets the sum. `space` has 32 entries.
__device__ __forceinline__ uint32_t block_prefix(uint32_t value, uint32_t* space, uint32_t* total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint32_t sum = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == 31) space[warp] = sum;
    __syncthreads();
    uint32_t of_warp = lane < kThreads / 32 ? space[lane] : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, of_warp, offset);
        if (lane >= offset) of_warp += other;
    }
    const uint32_t before = warp ? __shfl_sync(0xffffffffu, of_warp, warp - 1) : 0;
    *total = __shfl_sync(0xffffffffu, of_warp, 31);
    __syncthreads();
    return sum + before;
}

template <typename Visit>
__device__ __forceinline__ void for_each_score(const float* scores, int start, int end, Visit visit) {
    // 16-byte loads from the multiple of 4 at or below start, one ahead of its use; every thread makes the same number of visits.
    const int first = (start & ~3) + static_cast<int>(threadIdx.x) * 4;
    auto load = [&](int at) { return at < end ? __ldcs(reinterpret_cast<const float4*>(scores + at)) : float4{0.f, 0.f, 0.f, 0.f}; };
    float4 next = load(first);
    for (int begin = start & ~3, at = first; begin < end; begin += kThreads * 4, at += kThreads * 4) {
        const float4 now = next;
        next = load(at + kThreads * 4);
        visit(now, at);
    }
}

__global__ void __launch_bounds__(kThreads, 2) select_topk(const float* scores, int64_t stride, const int* starts, const int* ends, int topk,
                                                      int* picked) {
    extern __shared__ uint32_t list[];  // kListed positions, then their ordered scores
    __shared__ uint32_t bins[kBins];
    __shared__ uint32_t space[32];
    __shared__ uint32_t found[3];
    uint32_t* const list_score = list + kListed;
    const int row = blockIdx.x, start = starts[row], end = ends[row], count = max(end - start, 0);
    scores += row * stride;
    picked += static_cast<int64_t>(row) * topk;
    if (count <= topk) {
        for (int i = threadIdx.x; i < topk; i += kThreads) picked[i] = i < count ? start + i : -1;
        return;
    }
    // Thread i owns kOwn bins from the top down; the bin where the running count reaches `wanted_of` the total is the threshold's.
    constexpr int kOwn = kBins / kThreads;
    auto find_bin = [&](auto wanted_of) {
        const uint32_t* const top = bins + kBins - 1 - threadIdx.x * kOwn;
        uint32_t sum = 0, total;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) sum += top[-i];
        uint32_t before = block_prefix(sum, space, &total) - sum;
        const uint32_t wanted = wanted_of(total);
        if (before < wanted && before + sum >= wanted) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const uint32_t here = top[-i];
                if (before < wanted && before + here >= wanted)
                    found[0] = kBins - 1 - (threadIdx.x * kOwn + i), found[1] = wanted - before, found[2] = here;
                before += here;
            }
        }
        __syncthreads();
    };
    // Lists what is at least `lowest`, in key order, as far as there is room; returns how many there are.
    auto list_from = [&](float lowest) {
        uint32_t done = 0;
        // A warp takes 512 scores at a time, a thread four runs of 4 among them. The counts of the four runs are the bytes of one word.
        const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
        auto load = [&](int at) { return at < end ? __ldcs(reinterpret_cast<const float4*>(scores + at)) : float4{0.f, 0.f, 0.f, 0.f}; };
        int at = (start & ~3) + warp * 512 + lane * 4;
        float4 next[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) next[r] = load(at + r * 128);
        uint32_t* buffer = space;
        for (int begin = start & ~3; begin < end; begin += kThreads * 16, at += kThreads * 16) {
            float4 now[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) now[r] = next[r], next[r] = load(at + kThreads * 16 + r * 128);
            uint32_t hits = 0;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                hits |= (now[r].x >= lowest ? 1u : 0u) << (4 * r) | (now[r].y >= lowest ? 2u : 0u) << (4 * r) |
                        (now[r].z >= lowest ? 4u : 0u) << (4 * r) | (now[r].w >= lowest ? 8u : 0u) << (4 * r);
            }
            const int first = at - lane * 4;
            if (first < start || first + 511 >= end) {  // the same for a whole warp
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int key = at + i / 4 * 128 + i % 4;
                    if (key < start || key >= end) hits &= ~(1u << i);
                }
            }
            const uint32_t mine = __popc(hits & 0xf) | __popc(hits & 0xf0) << 8 | __popc(hits & 0xf00) << 16 | __popc(hits & 0xf000) << 24;
            uint32_t until = mine;  // no byte exceeds 128
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const uint32_t other = __shfl_up_sync(0xffffffffu, until, offset);
                if (lane >= offset) until += other;
            }
            const uint32_t runs = __shfl_sync(0xffffffffu, until, 31);
            const uint32_t of_runs[4] = {runs & 0xff, runs >> 8 & 0xff, runs >> 16 & 0xff, runs >> 24};
            if (lane == 0) buffer[warp] = of_runs[0] + of_runs[1] + of_runs[2] + of_runs[3];
            __syncthreads();
            uint32_t of_warps = lane < kThreads / 32 ? buffer[lane] : 0;
#pragma unroll
            for (int offset = 1; offset < kThreads / 32; offset *= 2) {
                const uint32_t other = __shfl_up_sync(0xffffffffu, of_warps, offset);
                if (lane >= offset) of_warps += other;
            }
            uint32_t to = done + (warp ? __shfl_sync(0xffffffffu, of_warps, warp - 1) : 0);
            done += __shfl_sync(0xffffffffu, of_warps, kThreads / 32 - 1);
            buffer = buffer == space ? space + 16 : space;  // the next step writes the other half: one barrier per step is enough
            const uint32_t before = until - mine;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                // Few threads have a hit and hardly one has two: a loop over hits, not a branch per score.
                uint32_t place = to + (before >> (8 * r) & 0xff);
                for (uint32_t left = hits >> (4 * r) & 0xf; left; left &= left - 1, ++place) {
                    const int i = __ffs(left) - 1;
                    const float low_pair = i & 1 ? now[r].y : now[r].x, high_pair = i & 1 ? now[r].w : now[r].z;
                    if (place < kListed) list[place] = at + r * 128 + i, list_score[place] = ordered(i & 2 ? high_pair : low_pair);
                }
                to += of_runs[r];
            }
        }
        __syncthreads();  // `space` serves other counts next
        return done;
    };
    uint32_t prefix = 0, wanted = topk;  // the threshold's bits so far; how many of the values with these bits are taken
    uint32_t listed = 0;                 // > 0: the list holds all that can still be taken
    // Round -1: pieces of 16 scores, one in 16 of all, tell where a list of about `aim` begins. Whether it holds enough and not too many
    // is known when it is made; if not, the threshold's upper bits are counted as without it. Of short rows and lists the sample knows too little.
    const float aim = 0.93f * sqrtf(static_cast<float>(topk) * kListed);
    const bool sampled = count >= 16384 && 2 * topk <= kListed && aim >= 800.f;
    for (int round = sampled ? -1 : 0; round < 3; ++round) {
        const int shift = round <= 0 ? 19 : round == 1 ? 6 : 0, bits = round == 2 ? 6 : 13, above = round <= 0 ? 32 : round == 1 ? 19 : 6;
        for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
        __syncthreads();
        if (round < 0) {
            for (int at = (start & ~3) + static_cast<int>(threadIdx.x) / 4 * 256 + (threadIdx.x & 3) * 4; at < end; at += kThreads / 4 * 256) {
                const float4 v = __ldcg(reinterpret_cast<const float4*>(scores + at));
                const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (at + i >= start && at + i < end) atomicAdd(&bins[ordered(values[i]) >> 19], 1u);
            }
        } else if (listed) {
            for (uint32_t i = threadIdx.x; i < listed; i += kThreads) {
                const uint32_t u = list_score[i];
                if (round == 0 || (u >> above) == (prefix >> above)) atomicAdd(&bins[(u >> shift) & ((1u << bits) - 1)], 1u);
            }
        } else {
            for_each_score(scores, start, end, [&](const float4 v, int at) {
                const float values[4] = {v.x, v.y, v.z, v.w};
                if (round == 0 && at >= start && at + 3 < end) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) atomicAdd(&bins[ordered(values[i]) >> 19], 1u);
                    return;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t u = ordered(values[i]);
                    const bool same = round == 0 || (u >> (above & 31)) == (prefix >> (above & 31));
                    if (at + i >= start && at + i < end && same) atomicAdd(&bins[(u >> shift) & ((1u << bits) - 1)], 1u);
                }
            });
        }
        __syncthreads();
        find_bin([&](uint32_t total) {
            return round < 0 ? max(1u, static_cast<uint32_t>(aim / static_cast<float>(count) * static_cast<float>(total))) : wanted;
        });
        uint32_t lowest = found[0] << shift, candidates = 0;
        if (round >= 0) {
            prefix |= lowest, wanted = found[1], lowest = prefix;
            candidates = topk - wanted + found[2];  // everything above, and all that share the threshold's upper bits
        }
        __syncthreads();
        if (round <= 0 && !listed && candidates <= kListed && lowest >= 0x00800000u && lowest < 0xff800000u) {  // not among NaN: those do not compare
            const uint32_t done = list_from(from_ordered(lowest));  // all bits below the upper ones are 0
            if (round == 0) {
                listed = done;
                if (done != candidates)  // NaN among the row's own scores: the rest of the row must still be defined
                    for (int i = threadIdx.x; i < topk; i += kThreads) picked[i] = -1;
            } else if (done >= static_cast<uint32_t>(topk) && done <= kListed) {
                listed = done;
            }
            __syncthreads();
        }
    }
    uint32_t before_above = 0, before_equal = 0;
    if (listed) {
        for (uint32_t first = 0; first < listed; first += kThreads) {
            const uint32_t i = first + threadIdx.x, u = i < listed ? list_score[i] : 0u;
            const bool larger = u > prefix, equal = u == prefix && i < listed;
            const uint32_t mine = larger + (equal << 16);
            uint32_t total;
            const uint32_t until = block_prefix(mine, space, &total) - mine;
            const uint32_t above = before_above + (until & 0xffff), same = before_equal + (until >> 16);
            if (larger || (equal && same < wanted)) picked[above + min(same, wanted)] = list[i];
            before_above += total & 0xffff, before_equal += total >> 16;
        }
        return;
    }
    for_each_score(scores, start, end, [&](const float4 v, int at) {
        const float values[4] = {v.x, v.y, v.z, v.w};
        uint32_t counts = 0, u[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool inside = at + i >= start && at + i < end;
            u[i] = inside ? ordered(values[i]) : 0u;
            counts += (u[i] > prefix && inside) + ((u[i] == prefix && inside) << 16);
        }
        uint32_t total;
        const uint32_t until = block_prefix(counts, space, &total) - counts;
        uint32_t larger = before_above + (until & 0xffff), equal = before_equal + (until >> 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (at + i < start || at + i >= end) continue;
            if (u[i] > prefix) picked[larger++ + min(equal, wanted)] = at + i;
            else if (u[i] == prefix) {
                if (equal < wanted) picked[larger + equal] = at + i;
                ++equal;
            }
        }
        before_above += total & 0xffff, before_equal += total >> 16;
    });
}

template <bool kFp8>
cudaError_t launch(const ScoreArguments& x, cudaStream_t stream) {
    cudaError_t error = cudaFuncSetAttribute(score<kFp8>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<kFp8>::kSharedBytes);
    if (error != cudaSuccess) return error;
    const dim3 grid((x.t + kQueries - 1) / kQueries, static_cast<unsigned>((x.keys + x.chunk - 1) / x.chunk));
    score<kFp8><<<grid, kGroups * 128, Shape<kFp8>::kSharedBytes, stream>>>(x);
    return cudaGetLastError();
}

}  // namespace

extern "C" {

int indexer_scores(const void* q, const void* k, const float* gates, const float* key_scale, const int* starts, const int* ends,
                   float* scores, int t, int64_t keys, int64_t stride, int chunk, int fp8, cudaStream_t stream) {
    if (t == 0 || keys == 0) return cudaSuccess;
    const ScoreArguments x{q, k, gates, key_scale, starts, ends, scores, t, chunk, keys, stride};
    return fp8 ? launch<true>(x, stream) : launch<false>(x, stream);
}

int indexer_select(const float* scores, int64_t stride, const int* starts, const int* ends, int t, int topk, int* picked,
                   cudaStream_t stream) {
    if (t == 0) return cudaSuccess;
    constexpr int kListBytes = kListed * 8;
    const cudaError_t error = cudaFuncSetAttribute(select_topk, cudaFuncAttributeMaxDynamicSharedMemorySize, kListBytes);
    if (error != cudaSuccess) return error;
    select_topk<<<t, kThreads, kListBytes, stream>>>(scores, stride, starts, ends, topk, picked);
    return cudaGetLastError();
}

}
