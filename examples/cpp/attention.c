/* Attention from C: two packed sequences, causal, and what a refusal says.
 *
 *     cc -std=c99 attention.c -I$INCLUDE $LIBRARY -Wl,-rpath,$(dirname $LIBRARY) -lm
 *
 * with the paths that anyattn.get_include() and anyattn.get_library() return; or by CMake, see CMakeLists.txt. */
#include <anyattn.h>

#include <math.h>
#include <stdio.h>

enum { HEADS = 4, HEADS_KV = 2, DIM = 16, TOTAL = 12, BATCH = 2 };

static float q[TOTAL * HEADS * DIM], k[TOTAL * HEADS_KV * DIM], v[TOTAL * HEADS_KV * DIM];
static float out[TOTAL * HEADS * DIM], lse[HEADS * TOTAL];
static const int32_t starts[BATCH + 1] = {0, 5, TOTAL};

static void fill(float *values, int count, unsigned seed) {
    for (int i = 0; i < count; ++i) {
        seed = seed * 1664525u + 1013904223u;
        values[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
    }
}

/* One row of softmax(QK^T)V, over the keys of its sequence up to its own. */
static void plain(int first, int row, int head, double *expected) {
    const float *query = q + (row * HEADS + head) * DIM;
    double sum = 0;
    for (int d = 0; d < DIM; ++d) expected[d] = 0;
    for (int j = first; j <= row; ++j) {
        const int offset = (j * HEADS_KV + head / (HEADS / HEADS_KV)) * DIM;
        double score = 0;
        for (int d = 0; d < DIM; ++d) score += (double)query[d] * k[offset + d];
        const double weight = exp(score / sqrt(DIM));
        sum += weight;
        for (int d = 0; d < DIM; ++d) expected[d] += weight * v[offset + d];
    }
    for (int d = 0; d < DIM; ++d) expected[d] /= sum;
}

static double largest_error(void) {
    double largest = 0, expected[DIM];
    for (int b = 0; b < BATCH; ++b) {
        for (int row = starts[b]; row < starts[b + 1]; ++row) {
            for (int head = 0; head < HEADS; ++head) {
                plain(starts[b], row, head, expected);
                for (int d = 0; d < DIM; ++d) {
                    largest = fmax(largest, fabs(out[(row * HEADS + head) * DIM + d] - expected[d]));
                }
            }
        }
    }
    return largest;
}

int main(void) {
    char message[256];
    anyattn_call call = {.size = sizeof call};
    fill(q, TOTAL * HEADS * DIM, 1);
    fill(k, TOTAL * HEADS_KV * DIM, 2);
    fill(v, TOTAL * HEADS_KV * DIM, 3);

    call.batch = BATCH;
    call.total_q = call.total_k = TOTAL;
    call.seqlen_q = call.seqlen_k = 7; /* the longest */
    call.cu_seqlens_q = call.cu_seqlens_k = starts;
    call.nheads = HEADS;
    call.nheads_kv = HEADS_KV;
    call.head_dim = call.head_dim_v = DIM;
    call.scale = 1 / sqrt(DIM);
    call.flags = ANYATTN_HAS_RIGHT; /* right = 0: causal */
    call.q = anyattn_contiguous(q, ANYATTN_FLOAT32, TOTAL, HEADS, DIM);
    call.k = anyattn_contiguous(k, ANYATTN_FLOAT32, TOTAL, HEADS_KV, DIM);
    call.v = anyattn_contiguous(v, ANYATTN_FLOAT32, TOTAL, HEADS_KV, DIM);
    call.out = anyattn_contiguous(out, ANYATTN_FLOAT32, TOTAL, HEADS, DIM);
    call.lse = anyattn_contiguous(lse, ANYATTN_FLOAT32, HEADS, TOTAL, 1);
    call.message = message;
    call.message_bytes = sizeof message;

    const int32_t status = anyattn_forward(&call);
    if (status != ANYATTN_SUCCESS) {
        printf("%s: %s\n", anyattn_error_string(status), message);
        return 1;
    }
    const double error = largest_error();
    printf("two packed sequences, against softmax(QK^T)V: %.1e\n", error);

    call.nheads_kv = 3;
    const int32_t refused = anyattn_forward(&call);
    printf("4 heads over 3: %s: %s\n", anyattn_error_string(refused), message);
    return error < 1e-5 && refused == ANYATTN_INVALID_DIMENSION ? 0 : 1;
}
