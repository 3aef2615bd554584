#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FEWBIT_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fewbit {
namespace {

#ifdef FEWBIT_X86
struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
#if defined(_MSC_VER)
    int out[4];
    __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
    r.eax = static_cast<unsigned>(out[0]);
    r.ebx = static_cast<unsigned>(out[1]);
    r.ecx = static_cast<unsigned>(out[2]);
    r.edx = static_cast<unsigned>(out[3]);
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

// The register sets that the operating system saves on a context switch.
unsigned long long saved_state() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}

// Linux saves the tile registers only of processes that asked for it.
bool tiles_permitted(unsigned long long state) {
#if defined(__linux__)
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    return (state & 0x60000) == 0x60000 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    (void)state;
    return false;
#endif
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }
#endif

Cpu detect() {
    Cpu found;
#ifdef FEWBIT_X86
    const Registers one = cpuid(1, 0);
    if (!bit(one.ecx, 27)) return found;  // OSXSAVE: without it xgetbv must not be executed
    const unsigned long long state = saved_state();
    const Registers seven = cpuid(7, 0);
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
    found.avx2 = ymm && bit(one.ecx, 12) && bit(one.ecx, 29) && bit(seven.ebx, 5);
    found.avx512 = found.avx2 && zmm && bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) &&
                   bit(seven.ebx, 31);
    found.avx512_vnni = found.avx512 && bit(seven.ecx, 11);
    const unsigned more = seven.eax >= 1 ? cpuid(7, 1).eax : 0;
    found.avx_vnni = found.avx2 && bit(more, 4);
    found.avx512_bf16 = found.avx512 && bit(more, 5);
    found.amx_bf16 = found.avx512_bf16 && found.avx512_vnni && bit(seven.edx, 22) && bit(seven.edx, 24) && tiles_permitted(state);
#elif defined(__aarch64__) && defined(__linux__)
    found.dotprod = (getauxval(AT_HWCAP) >> 20) & 1u;  // HWCAP_ASIMDDP
#elif defined(__aarch64__) && defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    found.dotprod = sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#endif
    return found;
}

}  // namespace

const Cpu& cpu() {
    static const Cpu found = detect();
    return found;
}

}  // namespace fewbit
