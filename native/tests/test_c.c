/* anyattn.h is C: a dense call, its gradients, and a refusal. Numbers are judged by the other tests. */
#include <stdio.h>
#include <string.h>

#include "anyattn.h"

enum { ROWS = 3, DIM = 4 };

static int failures;

static void check(int good, const char *what) {
    if (good) return;
    ++failures;
    printf("%s\n", what);
}

int main(void) {
    float q[ROWS * DIM] = {0}, v[ROWS * DIM], out[ROWS * DIM], lse[ROWS], dq[ROWS * DIM], dk[ROWS * DIM],
                   dv[ROWS * DIM];
    char message[128] = "";
    anyattn_call call = {.size = sizeof call};
    for (int i = 0; i < ROWS * DIM; ++i) v[i] = (float)(i / DIM);
    call.batch = 1;
    call.seqlen_q = call.seqlen_k = ROWS;
    call.nheads = call.nheads_kv = 1;
    call.head_dim = call.head_dim_v = DIM;
    call.scale = 0.5;
    call.flags = ANYATTN_HAS_RIGHT;
    call.q = call.k = anyattn_contiguous(q, ANYATTN_FLOAT32, ROWS, 1, DIM);
    call.v = call.dout = anyattn_contiguous(v, ANYATTN_FLOAT32, ROWS, 1, DIM);
    call.out = anyattn_contiguous(out, ANYATTN_FLOAT32, ROWS, 1, DIM);
    call.dq = anyattn_contiguous(dq, ANYATTN_FLOAT32, ROWS, 1, DIM);
    call.dk = anyattn_contiguous(dk, ANYATTN_FLOAT32, ROWS, 1, DIM);
    call.dv = anyattn_contiguous(dv, ANYATTN_FLOAT32, ROWS, 1, DIM);
    call.lse = anyattn_contiguous(lse, ANYATTN_FLOAT32, 1, ROWS, 1);
    call.message = message;
    call.message_bytes = sizeof message;

    check(anyattn_version() == ANYATTN_VERSION, "the version");
    check(anyattn_call_size() == sizeof call, "the size of the struct");
    check(anyattn_workspace(&call, ANYATTN_BACKWARD) >= 0, "the workspace");
    check(anyattn_forward(&call) == ANYATTN_SUCCESS, message);
    check(out[0] == 0 && out[DIM] == 0.5f && out[2 * DIM] > 0.999f && out[2 * DIM] < 1.001f,
          "means of the rows so far");
    check(anyattn_backward(&call) == ANYATTN_SUCCESS, message);
    check(dv[2 * DIM] > 0.666f && dv[2 * DIM] < 0.667f, "a third of the last row's gradient");

    out[0] = 7;
    call.q.data = NULL;
    check(anyattn_forward(&call) == ANYATTN_NULL_POINTER && strstr(message, "q is null") && out[0] == 7, "a refusal");
    check(strcmp(anyattn_error_string(ANYATTN_NULL_POINTER), "null pointer") == 0, "its name");
    call.q = anyattn_contiguous(q, ANYATTN_FLOAT32, INT64_MAX, INT64_MAX, INT64_MAX);
    check(anyattn_forward(&call) == ANYATTN_INVALID_DIMENSION, "strides of no array");
    return failures != 0;
}
