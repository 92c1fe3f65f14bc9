/* A fork-join pool for jobs of some ten microseconds.
 *
 * A caller takes a slot, sets its bit in `open`, and works like everybody else: tasks are drawn from the slot's counter. When none are left
 * it clears the bit and waits until nobody is inside the slot. A worker goes inside first and looks at the bit afterwards; both sides are
 * sequentially consistent, so either the worker sees the slot closed or the caller sees the worker. Workers without work watch `open` for
 * SPIN_NS, which bridges the gap between two operators of a step, and then sleep: an idle server burns nothing.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

enum { SLOTS = 32, MOST_WORKERS = 255, SPIN_NS = 60000, PAUSES_A_LOOK = 32, TURNS = 32 /* draws that a thread makes from a large job */ };

typedef struct {
    void (*task)(void *, size_t);
    void *data;
    size_t count, step;
    atomic_int limit;                   /* workers that may be inside */
    _Alignas(64) atomic_size_t next;
    _Alignas(64) atomic_int inside;
    _Alignas(64) atomic_int waits;      /* the caller sleeps until `inside` is 0 */
} slot;

static slot slots[SLOTS];
static _Alignas(64) atomic_uint taken;  /* slots that have a caller */
static _Alignas(64) atomic_uint open;   /* slots that may have tasks left */
static _Alignas(64) atomic_int sleeping;
static atomic_int threads, started, computing;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

int us_pool_threads(void) { return atomic_load_explicit(&threads, memory_order_relaxed); }
void us_pool_enter(void) { atomic_fetch_add_explicit(&computing, 1, memory_order_relaxed); }
void us_pool_leave(void) { atomic_fetch_sub_explicit(&computing, 1, memory_order_relaxed); }

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void draw(slot *s) {
    for (;;) {
        const size_t begin = atomic_fetch_add_explicit(&s->next, s->step, memory_order_relaxed);
        if (begin >= s->count) return;
        const size_t end = s->count - begin < s->step ? s->count : begin + s->step;
        for (size_t i = begin; i < end; i++) s->task(s->data, i);
    }
}

/* Works in one slot, if it is still open and has room. */
static void help(unsigned index) {
    slot *s = &slots[index];
    const int others = atomic_fetch_add(&s->inside, 1);
    if (atomic_load(&open) >> index & 1 && others < s->limit) {
        draw(s);
        atomic_fetch_and(&open, ~(1u << index)); /* none left: nobody else need look. The caller cannot reuse the slot before we leave. */
    }
    if (atomic_fetch_sub(&s->inside, 1) == 1 && atomic_load(&s->waits)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&done);
        pthread_mutex_unlock(&lock);
    }
}

/* Open slots with room for one more. */
static unsigned wanted(void) {
    unsigned found = 0;
    for (unsigned left = atomic_load(&open); left; left &= left - 1) {
        const unsigned index = (unsigned)__builtin_ctz(left);
        const slot *s = &slots[index];
        if (atomic_load_explicit(&s->inside, memory_order_relaxed) < atomic_load_explicit(&s->limit, memory_order_relaxed)) found |= 1u << index;
    }
    return found;
}

static void wait_for_work(void) {
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&sleeping, 1);
    if (!wanted()) pthread_cond_wait(&work, &lock);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&lock);
}

static void *worker(void *unused) {
    int64_t until = now_ns() + SPIN_NS;
    for (;;) {
        const unsigned found = wanted();
        if (found) {
            help((unsigned)__builtin_ctz(found));
            until = now_ns() + SPIN_NS;
            continue;
        }
        for (int i = 0; i < PAUSES_A_LOOK && !atomic_load_explicit(&open, memory_order_relaxed); i++) relax();
        if (now_ns() < until) continue;
        wait_for_work();
        until = now_ns() + SPIN_NS;
    }
    return unused;
}

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }

/* Workers and other callers do not exist in the child. */
static void in_child(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&done, NULL);
    for (int i = 0; i < SLOTS; i++) atomic_store(&slots[i].inside, 0);
    atomic_store(&taken, 0);
    atomic_store(&open, 0);
    atomic_store(&sleeping, 0);
    atomic_store(&started, 0);
    atomic_store(&computing, 0);
}

static void prepare_for_forks(void) { pthread_atfork(before_fork, after_fork, in_child); }

/* The handlers stand before the first worker can: a fork beside their registration would leave the child with workers that it does not have. */
EXPORT void us_share_threads(int count) {
    pthread_once(&once, prepare_for_forks);
    atomic_store(&threads, count > MOST_WORKERS + 1 ? MOST_WORKERS + 1 : count);
}

/* Sees to it that so many workers run; fewer when the system gives no more. */
static int start(int workers) {
    int have = atomic_load_explicit(&started, memory_order_acquire);
    if (have >= workers) return have;
    sigset_t all, before;
    sigfillset(&all);
    pthread_mutex_lock(&lock);
    /* Signals are for the threads of the program. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (have = atomic_load(&started); have < workers; have++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL)) break;
        pthread_detach(thread);
        atomic_store_explicit(&started, have + 1, memory_order_release);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_unlock(&lock);
    return have;
}

static int take(void) {
    unsigned seen = atomic_load(&taken);
    while (~seen) {
        const unsigned index = (unsigned)__builtin_ctz(~seen);
        if (atomic_compare_exchange_weak(&taken, &seen, seen | 1u << index)) return (int)index;
    }
    return -1;
}

static void wake(int workers) {
    if (!atomic_load(&sleeping)) return;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < workers && i < atomic_load(&sleeping); i++) pthread_cond_signal(&work);
    pthread_mutex_unlock(&lock);
}

static void wait_until_left(slot *s) {
    const int64_t until = now_ns() + SPIN_NS;
    do
        for (int i = 0; i < PAUSES_A_LOOK; i++) {
            if (!atomic_load(&s->inside)) return;
            relax();
        }
    while (now_ns() < until);
    pthread_mutex_lock(&lock);
    atomic_store(&s->waits, 1);
    while (atomic_load(&s->inside)) pthread_cond_wait(&done, &lock);
    atomic_store(&s->waits, 0);
    pthread_mutex_unlock(&lock);
}

/* 0: the caller has to do it alone. */
static int run_shared(void (*task)(void *, size_t), size_t count, void *data) {
    const int all = us_pool_threads(), runs = atomic_load_explicit(&computing, memory_order_relaxed), share = runs > 1 ? all / runs : all;
    if (count < 2 || share < 2 || !start(all - 1)) return 0;
    const int index = take();
    if (index < 0) return 0;
    slot *s = &slots[index];
    const int workers = count - 1 < (size_t)share - 1 ? (int)count - 1 : share - 1;
    s->task = task, s->data = data, s->count = count;
    s->step = count / ((size_t)share * TURNS) ? count / ((size_t)share * TURNS) : 1;
    atomic_store(&s->limit, workers);
    atomic_store(&s->next, 0);
    atomic_fetch_or(&open, 1u << index);
    wake(workers);
    draw(s);
    atomic_fetch_and(&open, ~(1u << index));
    wait_until_left(s);
    atomic_fetch_and(&taken, ~(1u << index));
    return 1;
}

void us_pool_run(void (*task)(void *, size_t), size_t count, void *data) {
    if (run_shared(task, count, data)) return;
    for (size_t i = 0; i < count; i++) task(data, i);
}

/* For other native code beside the operators; they and it share the threads. */
EXPORT void us_parallel_for(void (*task)(void *, size_t), size_t count, void *data) {
    us_pool_enter();
    us_pool_run(task, count, data);
    us_pool_leave();
}
