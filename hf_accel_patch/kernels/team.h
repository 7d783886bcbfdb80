/* Work that threads share piece by piece. Whoever is free takes the next piece, so a slow core, or one that another
 * process has taken, does less of it, and nobody waits for a thread that has not begun.
 */
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>

/* How many threads are to work, or the address of a team that waits for work already. */
typedef intptr_t crew;
typedef void (*work)(void *argument, int64_t start, int64_t stop);

enum {
    MOST_THREADS = 4096,    /* numbers above are addresses */
    PIECES = 4,             /* for each thread, where that makes them neither smaller nor larger than */
    LEAST_BYTES = 1 << 13,  /* less is not worth the way from one core to another */
    MOST_BYTES = 1 << 19,   /* what a thread has taken that is held up then, the others wait for */
    SPINS = 1000,           /* that a thread waits for others before it lets other processes go first */
};

typedef struct {
    int threads;
    work function;
    void *argument;
    int64_t items, step, pieces;
    uint64_t ticket __attribute__((aligned(64))); /* the round, and in the lower half the pieces that nobody has taken */
    int64_t done __attribute__((aligned(64)));    /* pieces of this round */
} team;

#define OVER UINT64_MAX /* a ticket: there is no other round */

static inline int64_t threads_of(crew who) { return who > MOST_THREADS ? ((team *)who)->threads : who; }

/* Does one piece. Returns whether there was one. What a round is about does not change before all its pieces are done. */
static inline int take(team *t) {
    uint64_t ticket = __atomic_load_n(&t->ticket, __ATOMIC_ACQUIRE);
    do {
        if (!(uint32_t)ticket || ticket == OVER) return 0;
    } while (!__atomic_compare_exchange_n(&t->ticket, &ticket, ticket - 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    const int64_t start = (t->pieces - (uint32_t)ticket) * t->step, stop = start + t->step;
    t->function(t->argument, start, stop < t->items ? stop : t->items);
    __atomic_fetch_add(&t->done, 1, __ATOMIC_RELEASE);
    return 1;
}

static inline void pause_after(int *spins) {
    if (*spins < SPINS) {
        ++*spins;
        _mm_pause();
    } else {
        sched_yield();
    }
}

/* A round: its pieces are done when this returns. */
static inline void lead(team *t) {
    int spins = 0;
    const uint64_t round = (__atomic_load_n(&t->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    __atomic_store_n(&t->done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&t->ticket, round << 32 | (uint32_t)t->pieces, __ATOMIC_RELEASE);
    while (take(t)) {}
    while (__atomic_load_n(&t->done, __ATOMIC_ACQUIRE) < t->pieces) pause_after(&spins);
}

/* Works in all rounds until it is over. */
static inline void follow(team *t) {
    int spins = 0;
    while (__atomic_load_n(&t->ticket, __ATOMIC_RELAXED) != OVER) {
        if (take(t))
            spins = 0;
        else
            pause_after(&spins);
    }
}

/* `function` for `items` items, of so many bytes (1 or more) to read each. */
static inline void each(crew who, int64_t items, int64_t bytes, work function, void *argument) {
    const int64_t threads = threads_of(who), even = items / (PIECES * threads);
    const int64_t least = (LEAST_BYTES + bytes - 1) / bytes, most = MOST_BYTES / bytes;
    const int64_t wanted = even < most ? even : most, step = wanted > least ? wanted : least;
    if (threads == 1 || items <= step) {
        function(argument, 0, items);
        return;
    }
    team own = {0}, *t = who > MOST_THREADS ? (team *)who : &own;
    t->function = function, t->argument = argument, t->items = items, t->step = step;
    t->pieces = (items + step - 1) / step;
    if (t != &own) {
        lead(t);
        return;
    }
    own.ticket = (uint32_t)own.pieces;
#pragma omp parallel num_threads((int)threads)
    while (take(&own)) {}
}
