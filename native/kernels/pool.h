/* The threads that all operators share: fork and join, made for many short jobs in a row. */
#ifndef UNDERSTUDY_POOL_H
#define UNDERSTUDY_POOL_H

#include <stddef.h>

/* How many threads may compute, callers included; 0: nobody said. Workers start at the first job. */
int us_pool_threads(void);

/* An operator begins or ends to compute, in any session: about the number of runs that go on at once. */
void us_pool_enter(void);
void us_pool_leave(void);

/* Runs task(data, 0 .. count - 1), in any order, on the caller and on idle workers; returns when all are done. Jobs of several callers go on
 * side by side and divide the threads: where each has one or none, the caller runs everything itself, as splitting would only add waiting. */
void us_pool_run(void (*task)(void *, size_t), size_t count, void *data);

#endif
