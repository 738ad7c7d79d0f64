// Score programs: the functions score_mod and mask_mod as instructions on registers, in 32-bit words.
//
// A program is a ScoreHeader, its arrays, and five sections, one behind the other. A section is a ScoreSection, its
// instructions in the order of the stages, and its terms. Register 0 is the score that score_mod gets. The last instruction
// of pairs may write the result of score_mod there. Host code and every instruction set compile this for themselves, hence
// the anonymous namespace.
#pragma once
#include "anyattn.h"

namespace {

constexpr int32_t kScoreVersion = 3;
constexpr int64_t kScoreRegisters = 256;  // of a section, at most

enum ScoreOperation : int32_t {
#define ANYATTN_SCORE_OPERATION(name, operands) kScore_##name,
#include "score_operations.def"
#undef ANYATTN_SCORE_OPERATION
    kScoreOperations
};

// When instructions run: once for a tile; for the queries of its panel; for its keys; for the pairs of some keys of the
// tile at a time.
enum ScoreStage { kOnce, kOfLanes, kOfKeys, kOfPairs, kScoreStages };

// What instructions of pairs, results and adjoints read: a register with a number for every pair; for every lane; for every
// key, as a vector of equal numbers; or one number. An operand is a register plus its form times kScoreRegisters.
enum ScoreForm { kFormPairs, kFormLanes, kFormKeys, kFormOnce, kScoreForms };

// Results of the sections: score and mask; these and the derivative by the score; the gradients of captured arrays. Those
// of the second pass: the results of kScoreBackward and the second derivative by the score; the gradients of captured
// arrays by the derivative. Only programs of the second pass need the last two sections, which are empty otherwise.
enum ScoreUse { kScoreForward, kScoreBackward, kScoreCapture, kScoreSecond, kScoreSecondCapture, kScoreSections };

struct ScoreHeader {
    int32_t version, arrays;
};

// Elements [offset, offset + size) of `captured` (kind 0) or of `captured_indices` (kind 1).
struct ScoreArray {
    int32_t kind, offset, size;
};

struct ScoreInstruction {
    int32_t operation, to, a, b, c;
};

// The gradient of the element that `index` names is the sum of dS times `adjoint` (-1: 1). stage: that of the index. With
// `keys` >= 0 the element is index + keys: `index` has numbers of lanes, `keys` of keys, and the stage is kOfLanes.
struct ScoreTerm {
    int32_t array, adjoint, index, keys, stage;
};

struct ScoreSection {
    int32_t registers;
    // Operands that are the results; -1: there is none. slope -1: it is 1. curvature -1: it is 0.
    int32_t score, mask, slope, curvature;
    int32_t reads_score, terms;
    int32_t instructions[kScoreStages];

    int64_t count() const {
        int64_t all = 0;
        for (int32_t n : instructions) all += n;
        return all;
    }
    const ScoreInstruction *code() const { return reinterpret_cast<const ScoreInstruction *>(this + 1); }
    const ScoreTerm *term() const { return reinterpret_cast<const ScoreTerm *>(code() + count()); }
    const ScoreSection *next() const { return reinterpret_cast<const ScoreSection *>(term() + terms); }
};

inline const ScoreArray *score_arrays(const anyattn_call &call) {
    return reinterpret_cast<const ScoreArray *>(call.score_program + sizeof(ScoreHeader) / sizeof(int32_t));
}

inline const ScoreSection &score_section(const anyattn_call &call, int use) {
    const auto *header = reinterpret_cast<const ScoreHeader *>(call.score_program);
    const auto *section = reinterpret_cast<const ScoreSection *>(score_arrays(call) + header->arrays);
    for (; use > 0; --use) section = section->next();
    return *section;
}

inline bool has_score_function(const anyattn_call &call) {
    return call.score_program && score_section(call, kScoreForward).score >= 0;
}

// Returns whether the derivative of the score by the product is not a constant.
inline bool has_slopes(const anyattn_call &call) {
    return call.softcap > 0 || score_section(call, kScoreBackward).slope >= 0;
}

inline bool has_mask_function(const anyattn_call &call) {
    return call.score_program && score_section(call, kScoreForward).mask >= 0;
}

// Returns whether a pass sums gradients of captured arrays. Without such terms, they are zeros.
inline bool has_captured_gradients(const anyattn_call &call) {
    return call.score_program && call.dcaptured.data && score_section(call, kScoreCapture).terms > 0;
}

}  // namespace
