// Thin names for the Hopper (sm_90a) instructions that the DSA kernels use, and the one shared-memory layout they share.
//
// Layout "tile": 64 rows x 128 bytes, 128-byte swizzle: 16-byte unit u of row r lies at r * 128 + ((u ^ (r & 7)) << 4).
// A tile starts at a multiple of 1024 bytes. The same tile serves a matrix product along its rows (K-major) or across them (MN-major).
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>

namespace hopper {

constexpr int kTileBytes = 64 * 128;

__device__ __forceinline__ uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ int swizzled(int row, int unit) { return row * 128 + ((unit ^ (row & 7)) << 4); }

__device__ __forceinline__ void copy16_async(uint32_t to, const void* from, bool real) {
    // A source size of 0 writes zeros and reads nothing.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// Barriers in shared memory that count arrivals; a phase is over when all have arrived, and the parity of the one waited for is given.
__device__ __forceinline__ void mbarrier_init(uint32_t at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_publish_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint32_t at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory"); }
// All copies this thread has started so far count as one arrival once they are done; the thread does not wait.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t at, int parity) {
    uint32_t over;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(over)
                     : "r"(at), "r"(parity) : "memory");
    } while (!over);
}

// A warpgroup's registers per thread, given back or taken from what others gave back.
template <int kRegisters>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

// Four 8 x 8 matrices of 16-bit numbers, one row's address per lane: 16 rows x 16 columns of a product's left operand.
__device__ __forceinline__ void store_matrices(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Shared memory written by ordinary stores or cp.async is read by wgmma through another proxy.
__device__ __forceinline__ void publish_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// Pins accumulators in place: after a wait nothing that reads them may be moved above it (the wait itself names no registers).
template <int kRegisters>
__device__ __forceinline__ void settle(float (&d)[kRegisters]) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// 2^x; what lies below the smallest normal float becomes 0. exp2f is the same instruction with a scaling round it for those.
__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Descriptor of an operand in tiles. Groups of 8 rows lie 1024 bytes apart; `next_tile` bytes to the following 64 columns matter only
// across the rows (MN-major) for operands wider than 64.
__device__ __forceinline__ uint64_t operand(uint32_t address, int next_tile = kTileBytes) {
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(next_tile >> 4) << 16) |
           (static_cast<uint64_t>(1024 >> 4) << 32) | (static_cast<uint64_t>(1) << 62);
}

// The operand `bytes` further on, by one addition; made anew it costs a dozen instructions, more than a small product hides.
__device__ __forceinline__ uint64_t beyond(uint64_t operand, int bytes) { return operand + static_cast<uint64_t>(bytes >> 4); }

#define R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(d, i) R4(d, i), R4(d, i + 4), R4(d, i + 8), R4(d, i + 12)
#define R64(d, i) R16(d, i), R16(d, i + 16), R16(d, i + 32), R16(d, i + 48)

// d[64 x 64] (+)= a b; kAcross* says that the operand is read across its rows.
template <int kAcrossA, int kAcrossB>
__device__ __forceinline__ void mma64(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "%32, %33, p, 1, 1, %35, %36;\n}\n"
        : R16(d, 0), R16(d, 16)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAcrossA), "n"(kAcrossB));
}

#define D64_NAMES                                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"    \
    "%61,%62,%63}, "

template <int kAcrossA, int kAcrossB>
__device__ __forceinline__ void mma128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " D64_NAMES "%64, %65, p, 1, 1, %67, %68;\n}\n"
        : R64(d, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAcrossA), "n"(kAcrossB));
}

__device__ __forceinline__ void mma128_fp8(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " D64_NAMES "%64, %65, p, 1, 1;\n}\n"
        : R64(d, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

#define D128_NAMES                                                                                                         \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"  \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"     \
    "%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,"     \
    "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,"      \
    "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "

template <int kAcrossA, int kAcrossB>
__device__ __forceinline__ void mma256(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " D128_NAMES "%128, %129, p, 1, 1, %131, %132;\n}\n"
        : R64(d, 0), R64(d, 64)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAcrossA), "n"(kAcrossB));
}

// The same with a in registers: four per thread and 16 columns. Thread i of warp w has rows 16 w + i / 4 and 8 further down, columns
// 2 (i % 4) and 8 further on: (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8).
__device__ __forceinline__ void mma64_left_in_registers(float (&d)[32], const uint32_t* a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
        : R16(d, 0), R16(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

template <int kAcrossB>
__device__ __forceinline__ void mma256_left_in_registers(float (&d)[128], const uint32_t* a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " D128_NAMES "{%128, %129, %130, %131}, %132, 1, 1, 1, %133;\n"
        : R64(d, 0), R64(d, 64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAcrossB));
}

}  // namespace hopper
