// The kernels of one level of CPU features. Each level compiles this file with its own flags and its own namespace; no
// inline function of the standard library may be used here, since the linker would keep one level's copy for all.
//
// Some kernels get a `Block<C>` (rows.hpp) of contiguous rows in the compute dtype C, and as many bytes of scratch as they
// say that they need for rows of n; they stand in truncation.hpp, sampling.hpp and probability.hpp. The others are formulas
// of one row, in any layout.
#include <stdint.h>
#include <stdlib.h>

namespace POLYSOFTMAX_LEVEL {

#include "run.hpp"
#include "losses.hpp"
#include "truncation.hpp"
#include "sampling.hpp"
#include "probability.hpp"

// A formula for rows in any layout, without a choice, or compiled with temperature and mask and without them.
#define FORMULA(letters, scratch, fills, name) \
    Formula<C> { letters, scratch, name<Along<C>>, name<Along<C, true>>, name<Across<C>>, nullptr, 0, fills }
#define SCORED(letters, scratch, options, name) \
    Formula<C> { letters, scratch, name<options, Along<C>>, name<options, Along<C, true>>, name<options, Across<C>>, nullptr, 0, options }

template <class C>
bool formula_of(const Problem& p, Formula<C>& f) {
    auto given = [&](int k) { return k < p.count && p.operands[k].data; };
    const bool options = given(1) || given(2);
    const bool of_answer = !options && given(3) && !given(6);
    const bool classes = p.count > 1 && p.operands[1].dtype < FLOAT16, smooths = p.options[2] != 0;
    const bool scored = given(2) || given(3), filters = p.options[0] != 0 || given(4) || given(5) || given(6);
    switch (p.kernel) {
        case 0: f = options ? SCORED("xvmR", 0, true, softmax) : SCORED("xvmR", 0, false, softmax); break;
        case 1: f = options ? SCORED("xvmR", 0, true, log_softmax) : SCORED("xvmR", 0, false, log_softmax); break;
        case 2: f = options ? SCORED("xomV", 0, true, logsumexp) : SCORED("xomV", 0, false, logsumexp); break;
        case 3:
            f = of_answer ? FORMULA("xvmrrRV", 0, false, softmax_pull_of_answer)
                          : SCORED("xvmrrRV", 1, true, softmax_pull);
            break;
        case 4:
            f = of_answer ? FORMULA("xvmrrRV", 0, false, log_softmax_pull_of_answer)
                          : SCORED("xvmrrRV", 1, true, log_softmax_pull);
            break;
        case 5: f = SCORED("xvmrR", 1, true, softmax_push); break;
        case 6: f = SCORED("xvmrR", 1, true, log_softmax_push); break;
        case 7: f = SCORED("xomvRR", 1, true, logsumexp_pull); break;
        case 8:
            f = classes ? FORMULA("xioV", 0, smooths, cross_entropy_of_classes)
                        : FORMULA("xroV", 0, true, cross_entropy_of_probabilities);
            break;
        case 9:
            f = classes ? FORMULA("xiovR", 0, smooths, cross_entropy_of_classes_pull)
                        : FORMULA("xrovR", 0, true, cross_entropy_of_probabilities_pull);
            break;
        case 10: f = options ? SCORED("xvmV", 0, true, entropy) : SCORED("xvmV", 0, false, entropy); break;
        case 11: f = SCORED("xvmvRV", 0, true, entropy_pull); break;
        case 12: f = SCORED("xxvmV", 0, true, kl_divergence); break;
        case 13: f = SCORED("xxvmvRRV", 0, true, kl_divergence_pull); break;
        case 14: f = {"xvmivvR", 0, nullptr, nullptr, nullptr, truncate_rows<C>, truncate_scratch<C>(p.n), false}; break;
        case 15: f = {"xkvmivvT", 0, nullptr, nullptr, nullptr, sample_rows<C>, sample_scratch<C>(p.n, p.options[1]), false, draws_work(p)}; break;
        case 16: f = {"wwwwWW", 0, nullptr, nullptr, nullptr, words_of<C>, 0, false}; break;
        case 17:
            f = filters ? Formula<C>{"xcvmivvL", 0, nullptr, nullptr, nullptr, log_prob_of_left<C>, left_scratch<C>(p.n), false}
                : scored ? SCORED("xcvmivvL", 0, true, log_prob)
                         : SCORED("xcvmivvL", 0, false, log_prob);
            break;
        case 18:
            f = filters ? Formula<C>{"xcvmivvdRV", 0, nullptr, nullptr, nullptr, log_prob_of_left_pull<C>, left_scratch<C>(p.n), false}
                        : SCORED("xcvmivvdRV", 1, true, log_prob_pull);
            break;
        case 19: f = {"xcmT", 0, nullptr, nullptr, nullptr, ranks_of_rows<C>, 0, false}; break;
        case 20: f = {"xmT", 0, nullptr, nullptr, nullptr, leading_of_rows<C>, leading_scratch<C>(p.n), false}; break;
        case 21: f = options ? SCORED("xvmVVV", 0, true, partial) : SCORED("xvmVVV", 0, false, partial); break;
        default: return false;
    }
    return (int)__builtin_strlen(f.letters) == p.count;
}
#undef FORMULA
#undef SCORED

// Answers of one entry a row become their sum or mean, in the order that a row of them is added in.
template <class C>
int run_and_reduce(Problem& p, const Formula<C>& f, Pieces pieces, int threads) {
    Operand& answers = p.operands[p.count - 1];
    char* const answer = answers.data;
    if (f.letters[p.count - 1] != 'V' || !answer || answers.dtype != Code<C>::dtype) return 2;
    C few[64];
    C* const all = p.rows <= 64 ? few : (C*)malloc(p.rows * sizeof(C));
    if (!all) return 1;
    answers.data = (char*)all;
    for (int d = 0; d < p.dimensions; d++) answers.strides[d] = p.index_strides[d] * (int64_t)sizeof(C);
    const int failed = p.rows ? run_rows<C>(p, f, pieces, threads) : 0;
    const Along<C> row{p.rows, nullptr, threads > 1 ? pieces : nullptr};
    const C sum = row.sum([&](int64_t i) { return all[i]; }).value, mean = sum / (C)(p.rows ? p.rows : 1);
    __builtin_memcpy(answer, p.reduction() == MEAN ? &mean : &sum, sizeof(C));
    if (all != few) free(all);
    return failed;
}

template <class C>
int run_as(Problem& p, Pieces pieces, int threads) {
    Formula<C> f;
    if (!formula_of(p, f)) return 2;
    return p.reduction() == NONE ? run_rows<C>(p, f, pieces, threads) : run_and_reduce<C>(p, f, pieces, threads);
}

int run(const int64_t* words, const int64_t* addresses, Pieces pieces, int threads) {
    Problem p;
    if (!parse(words, addresses, p)) return 2;
    return p.compute == FLOAT32 ? run_as<float>(p, pieces, threads) : run_as<double>(p, pieces, threads);
}

}  // namespace POLYSOFTMAX_LEVEL
