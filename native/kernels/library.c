/* The shared library: which instruction set runs here, and the direct calls that need no ONNX Runtime (ctypes, sanitizers). */
#define _GNU_SOURCE
#include "ops.h"
#include "products.h"
#include "decoder.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static int always(void) { return 1; }
#ifdef US_HAVE_AVX2
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }
#endif
#ifdef US_HAVE_AVX512VNNI
static int has_avx512vnni(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

static const struct { const us_kernels *kernels; int (*runs_here)(void); } builds[] = {
#ifdef US_HAVE_AVX512VNNI
    {&us_kernels_avx512vnni, has_avx512vnni},
#endif
#ifdef US_HAVE_AVX2
    {&us_kernels_avx2, has_avx2},
#endif
    {&us_kernels_base, always},
};
enum { BUILDS = sizeof builds / sizeof *builds };

static const us_kernels *chosen;
static char choice_failure[200];
static pthread_once_t chosen_once = PTHREAD_ONCE_INIT;

static const us_kernels *find(const char *name) {
    for (int i = 0; i < BUILDS; i++)
        if (builds[i].runs_here() && (!name || !strcmp(name, builds[i].kernels->name))) return builds[i].kernels;
    return NULL;
}

static void choose(void) {
    const char *forced = getenv("UNDERSTUDY_KERNEL_ISA");
    if (forced && !*forced) forced = NULL;
    chosen = find(forced);
    if (chosen) return;
    const char *text = us_message("UNDERSTUDY_KERNEL_ISA is '%.40s', which this build or this processor lacks; unset it or take 'base'", forced);
    strncpy(choice_failure, text, sizeof choice_failure - 1);
}

const us_kernels *us_choose(const char **why_not) {
    pthread_once(&chosen_once, choose);
    if (why_not) *why_not = chosen ? NULL : choice_failure;
    return chosen;
}

/* The name of the build in use, or "" when none can be used. */
EXPORT const char *us_isa_name(void) {
    const us_kernels *kernels = us_choose(NULL);
    return kernels ? kernels->name : "";
}

/* The builds that this processor can run, best first, separated by spaces. */
EXPORT const char *us_isa_list(void) {
    static _Thread_local char text[64];
    text[0] = 0;
    for (int i = 0; i < BUILDS; i++)
        if (builds[i].runs_here()) {
            if (text[0]) strcat(text, " ");
            strcat(text, builds[i].kernels->name);
        }
    return text;
}

static void *run_in_turn(void *pool, void (*task)(void *, size_t), size_t count, void *data) {
    for (size_t i = 0; i < count; i++) task(data, i);
    return NULL;
}

/* Direct calls: `isa` is a name from us_isa_list, or NULL for the one in use. They return NULL, or what is wrong with the arguments. */
#define DIRECT(name, driver, args_type)                                                                  \
    EXPORT const char *name(const char *isa, const args_type *args) {                                    \
        const char *why_not = NULL;                                                                      \
        const us_kernels *kernels = isa ? find(isa) : us_choose(&why_not);                               \
        us_runner runner = {.run = run_in_turn};                                                         \
        if (!kernels) return why_not ? why_not : us_message("no build '%.40s' runs here", isa);          \
        return driver(kernels, args, &runner);                                                           \
    }

DIRECT(us_direct_attention, us_attention, us_attention_args)
DIRECT(us_direct_norm, us_norm, us_norm_args)
DIRECT(us_direct_gelu, us_gelu, us_gelu_args)
DIRECT(us_direct_embed, us_embed, us_embed_args)

DIRECT(us_direct_tokens, us_tokens, us_tokens_args)
DIRECT(us_direct_skip, us_skip, us_skip_args)
DIRECT(us_direct_gated, us_gated, us_gated_args)
DIRECT(us_direct_paged, us_paged, us_paged_args)

EXPORT const char *us_direct_gemm(const char *isa, const us_gemm_args *args) {
    const char *why_not = NULL;
    const us_kernels *kernels = isa ? find(isa) : us_choose(&why_not);
    us_runner runner = {.run = run_in_turn};
    us_gemm_args full = *args;
    if (!kernels) return why_not ? why_not : us_message("no build '%.40s' runs here", isa);
    us_weights *weights = kernels->pack(args->b, args->depth, args->cols);
    if (!weights) return "out of memory for the packed weights";
    full.weights = weights;
    const char *wrong = us_gemm(kernels, &full, &runner);
    us_free_weights(weights);
    return wrong;
}

EXPORT const char *us_direct_float_gemm(const char *isa, const us_float_gemm_args *args) {
    const char *why_not = NULL;
    const us_kernels *kernels = isa ? find(isa) : us_choose(&why_not);
    us_runner runner = {.run = run_in_turn};
    us_float_gemm_args full = *args;
    if (!kernels) return why_not ? why_not : us_message("no build '%.40s' runs here", isa);
    us_float_weights *weights = us_float_pack(args->b, args->depth, args->cols);
    if (!weights) return "out of memory for the packed weights";
    full.weights = weights;
    const char *wrong = us_float_gemm(kernels, &full, &runner);
    us_free_float_weights(weights);
    return wrong;
}

DIRECT(us_direct_int4_gemm, us_int4_gemm, us_int4_gemm_args)
DIRECT(us_direct_lora_add, us_lora_add, us_lora_add_args)
