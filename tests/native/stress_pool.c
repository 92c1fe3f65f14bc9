/* Callers of several threads share the pool: every task runs once, whatever the sizes, the number of threads and the nesting; after a fork the
 * child has a pool of its own. For sanitizers without forks, and plainly with them. Usage: stress_pool <rounds> <forks> */
#include "../../native/kernels/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

void us_share_threads(int);
void us_parallel_for(void (*)(void *, size_t), size_t, void *);

enum { CALLERS = 4, MOST = 3000 };

typedef struct { int seen[MOST]; size_t count; int nested; } job; /* `seen` is plain on purpose: the pool has to order it */

static void once(void *data, size_t index) { ((int *)data)[index]++; }

static void task(void *data, size_t index) {
    job *j = data;
    j->seen[index]++;
    if (j->nested && index % 7 == 0) {
        int inner[5] = {0};
        us_parallel_for(once, 5, inner);
        for (int i = 0; i < 5; i++)
            if (inner[i] != 1) abort();
    }
}

static void round_of(job *j, unsigned *seed) {
    j->count = (size_t)(rand_r(seed) % 4 ? rand_r(seed) % 70 : rand_r(seed) % MOST);
    j->nested = rand_r(seed) % 5 == 0;
    memset(j->seen, 0, sizeof j->seen);
    us_parallel_for(task, j->count, j);
    for (size_t i = 0; i < MOST; i++)
        if (j->seen[i] != (i < j->count)) abort();
}

typedef struct { unsigned seed; long rounds; } work;

static void *caller(void *data) {
    work *w = data;
    job *j = malloc(sizeof *j);
    for (long r = 0; r < w->rounds; r++) {
        round_of(j, &w->seed);
        if (w->seed % 64 == 0) us_share_threads(1 + (int)(w->seed / 64 % 12));
        /* Long enough for the workers to fall asleep now and then. */
        if (w->seed % 50 == 1) nanosleep(&(struct timespec){0, 200000}, NULL);
    }
    free(j);
    return NULL;
}

static void fork_once(unsigned seed) {
    const pid_t child = fork();
    if (child == 0) {
        work w = {seed, 20};
        caller(&w);
        _exit(0);
    }
    int status = 1;
    if (child < 0 || waitpid(child, &status, 0) < 0 || status) abort();
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    pthread_t threads[CALLERS];
    work works[CALLERS];
    us_share_threads(12);
    for (int i = 0; i < CALLERS; i++) {
        works[i] = (work){(unsigned)i + 1, strtol(arguments[1], NULL, 10)};
        pthread_create(&threads[i], NULL, caller, &works[i]);
    }
    for (long f = 0; f < strtol(arguments[2], NULL, 10); f++) fork_once((unsigned)f + 77);
    for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
    printf("pool: no finding\n");
    return 0;
}
