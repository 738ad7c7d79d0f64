// Refuses score programs that a kernel could not run safely: registers, arrays and lengths stay inside their bounds.
#include "score_program.h"

#include <initializer_list>

#include "check.h"

namespace anyattn {
namespace {

constexpr int32_t kOperands[] = {
#define ANYATTN_SCORE_OPERATION(name, operands) operands,
#include "score_operations.def"
#undef ANYATTN_SCORE_OPERATION
};

// Reads a program from its first word to its last.
class Checker {
  public:
    explicit Checker(const anyattn_call &call) : call_(call), left_(call.score_words) {}

    int32_t program() {
        int32_t status = header();
        for (int use = 0; !status && use < kScoreSections; ++use) status = section(use);
        if (!status && left_ != 0) status = wrong("score_words", left_, "words behind the last section");
        return status;
    }

  private:
    const anyattn_call &call_;
    int64_t left_;  // words that were not read
    int32_t arrays_ = 0;
    const ScoreSection *section_ = nullptr;

    int32_t wrong(const char *what, int64_t value, const char *why) {
        return refuse(call_, ANYATTN_INVALID_VALUE, "score_program is not valid: %s is %lld (%s)", what,
                      (long long)value, why);
    }

    template <class T>
    const T *take(int64_t count) {
        const int64_t words = count * static_cast<int64_t>(sizeof(T) / sizeof(int32_t));
        if (count < 0 || words > left_) return nullptr;
        const int32_t *at = call_.score_program + (call_.score_words - left_);
        left_ -= words;
        return reinterpret_cast<const T *>(at);
    }

    int32_t header() {
        const auto *header = take<ScoreHeader>(1);
        if (!header) return wrong("score_words", call_.score_words, "too few");
        if (header->version != kScoreVersion) return wrong("version", header->version, "this library reads version 3");
        const auto *arrays = take<ScoreArray>(header->arrays);
        if (!arrays) return wrong("arrays", header->arrays, "more than there are words");
        arrays_ = header->arrays;
        for (int32_t i = 0; i < arrays_; ++i) {
            const ScoreArray &x = arrays[i];
            const int64_t end = x.kind == 0 ? call_.num_captured : call_.num_captured_indices;
            if (x.kind != 0 && x.kind != 1) return wrong("kind of an array", x.kind, "accepted: 0 and 1");
            const anyattn_array &data = x.kind == 0 ? call_.captured : call_.captured_indices;
            if (x.size > 0 && !data.data) return wrong("size of an array", x.size, "its elements are null");
            if (x.offset < 0 || x.size < 0 || int64_t(x.offset) + x.size > end) {
                return wrong("end of an array", int64_t(x.offset) + x.size, "outside the captured elements");
            }
        }
        return ANYATTN_SUCCESS;
    }

    int32_t section(int use) {
        section_ = take<ScoreSection>(1);
        if (!section_) return wrong("score_words", call_.score_words, "a section is missing");
        if (section_->registers < 1 || section_->registers > kScoreRegisters) {
            return wrong("registers", section_->registers, "accepted: 1 to 256");
        }
        for (int32_t result : {section_->score, section_->mask, section_->slope, section_->curvature}) {
            if (result != -1 && !is_operand(result)) return wrong("result", result, "no such register");
        }
        int32_t status = ANYATTN_SUCCESS;
        for (int stage = 0; !status && stage < kScoreStages; ++stage) status = instructions(stage);
        const auto *terms = status ? nullptr : take<ScoreTerm>(section_->terms);
        if (status) return status;
        if (!terms) return wrong("terms", section_->terms, "more than there are words");
        if (section_->terms && use != kScoreCapture && use != kScoreSecondCapture) {
            return wrong("terms", section_->terms, "accepted in sections 2 and 4");
        }
        for (int32_t i = 0; !status && i < section_->terms; ++i) status = term(terms[i]);
        return status;
    }

    int32_t instructions(int stage) {
        const int32_t count = section_->instructions[stage];
        const auto *code = take<ScoreInstruction>(count);
        if (!code) return wrong("instructions", count, "more than there are words");
        for (int32_t i = 0; i < count; ++i) {
            const int32_t first = stage == kOfPairs && i == count - 1 && section_->score == 0 ? 0 : 1;
            if (const int32_t status = instruction(code[i], stage, first)) return status;
        }
        return ANYATTN_SUCCESS;
    }

    bool is_register(int32_t number, int32_t first) const { return number >= first && number < section_->registers; }

    // A register in any form. The score has a number for every pair.
    bool is_operand(int32_t operand) const {
        if (operand < 0 || operand >= kScoreForms * kScoreRegisters) return false;
        const auto form = operand / int32_t(kScoreRegisters), number = operand % int32_t(kScoreRegisters);
        return is_register(number, form == kFormPairs ? 0 : 1);
    }

    // first: the lowest register that it may write.
    int32_t instruction(const ScoreInstruction &x, int stage, int32_t first) {
        if (x.operation < 0 || x.operation >= kScoreOperations) {
            return wrong("operation", x.operation, "no such operation");
        }
        if (!is_register(x.to, first)) return wrong("target", x.to, "no such register");
        const int32_t operands[] = {x.a, x.b, x.c};
        const bool rows = x.operation == kScore_read_rows_f, pairs = stage == kOfPairs;
        for (int i = 0; i < kOperands[x.operation]; ++i) {
            if (pairs && !rows ? !is_operand(operands[i]) : !is_register(operands[i], 1)) {
                return wrong("operand", operands[i], "no such register");
            }
        }
        if (rows && !is_register(x.c, 1)) return wrong("operand", x.c, "no such register");
        if ((rows || x.operation == kScore_spread_keys) && (!pairs || x.a == x.to || !is_register(x.a, 1))) {
            return wrong("stage of the operation", stage, "it makes pairs from another register");
        }
        if (x.operation == kScore_read_f || rows) return array(x.b, 0);
        return x.operation == kScore_read_i || x.operation == kScore_read_b ? array(x.b, 1) : ANYATTN_SUCCESS;
    }

    // An array of this kind that has elements.
    int32_t array(int32_t index, int32_t kind) {
        if (index < 0 || index >= arrays_) return wrong("array", index, "no such array");
        const ScoreArray &x = score_arrays(call_)[index];
        if (x.kind != kind) return wrong("kind of an array", x.kind, "the instruction reads the other kind");
        return x.size > 0 ? ANYATTN_SUCCESS : wrong("size of an array", x.size, "it is read");
    }

    int32_t term(const ScoreTerm &x) {
        if (x.adjoint != -1 && !is_operand(x.adjoint)) return wrong("adjoint", x.adjoint, "no such register");
        if (!is_register(x.index, 1)) return wrong("index", x.index, "no such register");
        if (x.keys != -1 && !is_register(x.keys, 1)) return wrong("keys", x.keys, "no such register");
        if (x.stage < 0 || x.stage >= kScoreStages || (x.keys != -1 && x.stage != kOfLanes)) {
            return wrong("stage of a term", x.stage, "no such stage");
        }
        return array(x.array, 0);
    }
};

}  // namespace

int32_t check_score_program(const anyattn_call &call, int32_t pass) {
    if (!call.score_program) {
        if (!call.dcaptured.data && !call.mask_blocks.data) return ANYATTN_SUCCESS;
        return refuse(call, ANYATTN_NULL_POINTER, "score_program is null, and dcaptured or mask_blocks is not");
    }
    if (call.seqlen_q > INT32_MAX || call.seqlen_k > INT32_MAX) {
        return refuse(call, ANYATTN_UNSUPPORTED, "score_program counts queries and keys up to 2^31 - 1");
    }
    if (pass == ANYATTN_APPEND) {
        return refuse(call, ANYATTN_UNSUPPORTED, "score_program is accepted in the passes of attention");
    }
    return Checker(call).program();
}

}  // namespace anyattn
