// Forward of sparse MLA for Hopper: q [t, h, 576], latent KV [T, 576] (value = first 512 columns), indices [t, k] with -1 = no key.
//
// One block works on one query and up to 64 of its heads; keys come in groups of 64, two groups in shared memory.
//   warpgroup 0:     S = Q K', running softmax, P to shared memory
//   warpgroups 1, 2: O += P V for columns 0..255 | 256..511 while warpgroup 0 works on the next keys; each also fetches the keys of its
//                    own columns as soon as its own product has read them, 32 keys at a time, so neither waits for the other.
// The running maximum is raised only when it grows by more than 8 (in log2), so that O is rarely rescaled; P stays below 2^8.
// Named barriers: 1 keys are there, 2 P is there, 3 P may be overwritten.
#include "hopper.cuh"

using namespace hopper;

namespace {

constexpr int kDK = 576, kDV = 512, kHeads = 64, kKeys = 64, kThreads = 384;
constexpr int kQ = 0, kK = 9 * kTileBytes, kStageBytes = 9 * kTileBytes, kP = kK + 2 * kStageBytes;
constexpr float kSlack = 8.f;
constexpr int kRescale = kP + kTileBytes, kLast = kRescale + kHeads * 4, kSharedBytes = kLast + 16;

struct Arguments {
    const __nv_bfloat16 *q, *kv;
    const int* indices;
    __nv_bfloat16* out;
    float* lse;  // [t, h] natural
    int t, h, k;
    float scale;
};

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

__global__ void __launch_bounds__(kThreads, 1) forward(const Arguments x) {
    extern __shared__ __align__(1024) char shared[];
    const uint32_t base = smem_address(shared);
    const int query = blockIdx.x, first_head = blockIdx.y * kHeads, rows = min(kHeads, x.h - first_head);
    const int warpgroup = threadIdx.x / 128, in_group = threadIdx.x & 127, lane = threadIdx.x & 31, row = in_group / 32 * 16 + lane / 4;
    const int64_t head_row = static_cast<int64_t>(query) * x.h + first_head;
    const int* indices = x.indices + static_cast<int64_t>(query) * x.k;
    constexpr float kLog2e = 1.4426950408889634f;
    float* rescale = reinterpret_cast<float*>(shared + kRescale);
    int* last = reinterpret_cast<int*>(shared + kLast);

    if (threadIdx.x == 0) *last = -1;
    const __nv_bfloat16* q = x.q + head_row * kDK;
    for (int i = threadIdx.x; i < kHeads * 72; i += kThreads) {
        const int r = i / 72, piece = i % 72;
        copy16_async(base + kQ + piece / 8 * kTileBytes + swizzled(r, piece & 7), q + static_cast<int64_t>(r < rows ? r : 0) * kDK + piece * 8,
                     r < rows);
    }
    copies_commit();
    int mine = -1;
    for (int i = threadIdx.x; i < x.k; i += kThreads)
        if (__ldg(indices + i) >= 0) mine = i;
    mine = __reduce_max_sync(0xffffffffu, mine);
    __syncthreads();
    if (lane == 0 && mine >= 0) atomicMax(last, mine);
    __syncthreads();
    const int blocks = *last < 0 ? 0 : *last / kKeys + 1;

    auto index_at = [&](int block, int r) {
        const int at = block * kKeys + r;
        return block < blocks && at < x.k ? __ldg(indices + at) : -1;
    };

    if (warpgroup == 0) {
        copies_wait<0>();
        publish_to_wgmma();
        barrier_sync(4, kThreads);  // Q is there
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
        const float factor = x.scale * kLog2e;
        const uint64_t queries_operand = operand(base + kQ), keys_operand = operand(base + kK);
        for (int block = 0; block < blocks; ++block) {
            const uint64_t keys_at = beyond(keys_operand, (block & 1) * kStageBytes);
            barrier_sync(1, kThreads);
            publish_to_wgmma();  // for all who copied keys: here no stores or copies of this thread's own are under way
            float s[32];
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 36; ++step) {
                const int at = step / 4 * kTileBytes + step % 4 * 32;
                mma64<0, 0>(s, beyond(queries_operand, at), beyond(keys_at, at), step > 0);
            }
            wgmma_commit();
            bool absent[16];
#pragma unroll
            for (int i = 0; i < 16; ++i) absent[i] = index_at(block, i / 2 * 8 + (lane & 3) * 2 + (i & 1)) < 0;
            wgmma_wait<0>();
            settle(s);
            float alpha[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = -INFINITY;
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    float& v = s[i / 2 * 4 + half * 2 + (i & 1)];
                    v = absent[i] ? -INFINITY : v * factor;
                    highest = fmaxf(highest, v);
                }
                highest = quad_max(highest);
                const float before = top[half];
                if (highest > before + kSlack) top[half] = highest;  // also the first time: before is -inf
                const float shift = top[half] == -INFINITY ? 0.f : top[half];
                alpha[half] = before == top[half] ? 1.f : exp2_of(before - shift);
                float part = 0.f;
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    float& v = s[i / 2 * 4 + half * 2 + (i & 1)];
                    v = exp2_of(v - shift);
                    part += v;
                }
                sum[half] = sum[half] * alpha[half] + part;
            }
            if (block > 0) barrier_sync(3, kThreads);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    *reinterpret_cast<__nv_bfloat162*>(shared + kP + swizzled(row + half * 8, j) + (lane & 3) * 4) =
                        __floats2bfloat162_rn(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]);
                if ((lane & 3) == 0) rescale[row + half * 8] = alpha[half];
            }
            publish_to_wgmma();
            barrier_arrive(2, kThreads);
        }
        if (blocks > 0) barrier_sync(3, kThreads);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float whole = quad_sum(sum[half]);
            const int head = row + half * 8;
            if ((lane & 3) == 0) {
                rescale[head] = whole > 0.f ? 1.f / whole : 0.f;
                if (head < rows) x.lse[head_row + head] = whole > 0.f ? (top[half] + log2f(whole)) / kLog2e : -INFINITY;
            }
        }
        barrier_arrive(5, kThreads);
    } else {
        const int side = warpgroup - 1, copy_row = in_group / 8, unit = in_group & 7;
        int key[4];
        auto look_up = [&](int block) {
#pragma unroll
            for (int i = 0; i < 4; ++i) key[i] = index_at(block, copy_row + i * 16);
        };
        // Half of this side's four column tiles, side 1 also of the rope tile: keys 32 half .. 32 half + 31. Without branches, since a
        // product is under way; behind the last block the keys are -1 and zeros are written.
        auto fetch = [&](int block, int half) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                const char* source = reinterpret_cast<const char*>(x.kv + static_cast<int64_t>(max(key[i], 0)) * kDK) + side * 512 + unit * 16;
                const uint32_t to = base + kK + (block & 1) * kStageBytes + side * 4 * kTileBytes + swizzled(copy_row + i * 16, unit);
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) copy16_async(to + tile * kTileBytes, source + tile * 128, key[i] >= 0);
                copy16_async_if(side == 1, to + 4 * kTileBytes, source + 512, key[i] >= 0);
            }
        };
        look_up(0);
        fetch(0, 0), fetch(0, 1);
        copies_commit();
        look_up(1);
        fetch(1, 0), fetch(1, 1);
        copies_commit();
        look_up(2);
        copies_wait<2>();
        publish_to_wgmma();
        barrier_arrive(4, kThreads);  // this thread's part of Q
        copies_wait<1>();
        if (blocks > 0) barrier_arrive(1, kThreads);

        const uint64_t p_operand = operand(base + kP), values_operand = operand(base + kK + side * 4 * kTileBytes);
        float o[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] = 0.f;
        for (int block = 0; block < blocks; ++block) {
            barrier_sync(2, kThreads);
            const float low = rescale[row], high = rescale[row + 8];
            if (__any_sync(0xffffffffu, low != 1.f || high != 1.f)) {
#pragma unroll
                for (int i = 0; i < 128; ++i) o[i] *= i & 2 ? high : low;
            }
            const uint64_t values_at = beyond(values_operand, (block & 1) * kStageBytes);
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                mma256<0, 1>(o, beyond(p_operand, step * 32), beyond(values_at, step * 2048), true);
                if (step & 1) wgmma_commit();
            }
            wgmma_wait<1>();
            copies_wait<0>();  // the next keys: waited for here, since P V does not need them
            if (block + 1 < blocks) barrier_arrive(1, kThreads);
            barrier_sync(6 + side, 128);  // all four warps of this side have read their columns of the first 32 keys
            fetch(block + 2, 0);
            wgmma_wait<0>();
            settle(o);
            barrier_arrive(3, kThreads);
            barrier_sync(6 + side, 128);  // and of the others
            fetch(block + 2, 1);
            copies_commit();
            look_up(block + 3);
        }
        copies_wait<0>();
        barrier_sync(5, kThreads);
        const float low = rescale[row], high = rescale[row + 8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int head = row + half * 8;
            if (head >= rows) continue;
            __nv_bfloat16* out = x.out + (head_row + head) * kDV + side * 256 + (lane & 3) * 2;
            const float factor = half ? high : low;
#pragma unroll
            for (int j = 0; j < 32; ++j)
                *reinterpret_cast<__nv_bfloat162*>(out + j * 8) =
                    __floats2bfloat162_rn(o[j * 4 + half * 2] * factor, o[j * 4 + half * 2 + 1] * factor);
        }
    }
}

}  // namespace

extern "C" int sparse_mla_forward(const void* q, const void* kv, const int* indices, void* out, float* lse, int t, int h, int k, float scale,
                                  cudaStream_t stream) {
    if (t == 0) return cudaSuccess;
    cudaError_t error = cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    const Arguments x{static_cast<const __nv_bfloat16*>(q), static_cast<const __nv_bfloat16*>(kv), indices,
                      static_cast<__nv_bfloat16*>(out), lse, t, h, k, scale};
    forward<<<dim3(t, (h + kHeads - 1) / kHeads), kThreads, kSharedBytes, stream>>>(x);
    return cudaGetLastError();
}
