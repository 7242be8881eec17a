// Values of the threads of a row, merged into one.

// A value of the kind S, words at a time, from the thread whose index differs in `mask`.
template <class S>
DEVICE S across(const S& mine, int mask) {
    S other;
    Word words[sizeof(S) / 4];
    memcpy(words, &mine, sizeof(S));
    UNROLL for (int i = 0; i < (int)(sizeof(S) / 4); i++) words[i] = word_across(words[i], mask);
    memcpy(&other, words, sizeof(S));
    return other;
}

const int SCRATCH = 2304;    // bytes of shared memory that merging takes in one block, and room
const int SLOT = 32;         // bytes of a value at most

const int WHOLE_BLOCK = 64;    // for more than the threads of a warp: as many as the block has

// Bytes that a merge takes: a value for every warp of the row.
template <int THREADS, bool CLUSTER>
DEVICE int bytes_of_merge() {
    return SLOT * (THREADS > 32 ? block_threads() / 32 : 1) * (CLUSTER ? cluster_size() : 1);
}

template <int THREADS, class S, class Merge>
DEVICE S merged_in_warp(S mine, Merge merge_two) {
    UNROLL for (int mask = 1; mask < (THREADS < 32 ? THREADS : 32); mask *= 2) {
        mine = merge_two(mine, across(mine, mask));
    }
    return mine;
}

// Merge a value of every warp of a row; each thread gets the answer, with the same bits. Every warp gives its value to
// all blocks of the row, so that one barrier is enough, and merges what it is given for itself. The memory is free again
// after the next barrier of all: of two merges one after the other, each needs its own. Before the first, a cluster
// has to know that all its blocks have begun. How many warps and blocks there are, powers of two, is for the launch to say.
template <int THREADS, bool CLUSTER, class S, class Merge>
DEVICE S merged_across_warps(S mine, char* memory, Merge merge_two) {
    static_assert(sizeof(S) <= SLOT, "the value has no room");
    if constexpr (THREADS > 32 || CLUSTER) {
        const int own = block_threads() / 32, blocks = CLUSTER ? cluster_size() : 1, all = own * blocks;
        S* slots = (S*)memory;
        int lane = thread_index() % 32, warp = thread_index() / 32;
        if constexpr (CLUSTER) {
            if (lane < blocks) {
                Word words[sizeof(S) / 4];
                memcpy(words, &mine, sizeof(S));
                Word* to = (Word*)(slots + cluster_rank() * own + warp);
                UNROLL for (int i = 0; i < (int)(sizeof(S) / 4); i++) give_word(to + i, words[i], lane);
            }
            cluster_arrive();
            cluster_wait();
        } else {
            if (lane == 0) slots[warp] = mine;
            block_barrier();
        }
        mine = slots[lane & (all - 1)];
        ONCE for (int i = 32; i < all; i += 32) mine = merge_two(mine, slots[i + lane]);
        ONCE for (int mask = 1; mask < 32 && mask < all; mask *= 2) mine = merge_two(mine, across(mine, mask));
    }
    return mine;
}

// Merge a value of every thread of a row.
template <int THREADS, bool CLUSTER, class S, class Merge>
DEVICE S merged_once(S mine, char* memory, Merge merge_two) {
    return merged_across_warps<THREADS, CLUSTER>(merged_in_warp<THREADS>(mine, merge_two), memory, merge_two);
}

// The same in one block, in memory that the last merge may have used.
template <int THREADS, class S, class Merge>
DEVICE S merged(S mine, char* memory, Merge merge_two) {
    if constexpr (THREADS > 32) block_barrier();
    return merged_once<THREADS, false>(mine, memory, merge_two);
}
