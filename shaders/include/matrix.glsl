// Cooperative matrices: tiles that the invocations of a subgroup multiply together, in shapes that the driver offers.
//
// A workgroup owns OWNED rows (in dkdv_matrix.comp: keys), M per subgroup, and loops over keys (rows) in steps of STEP,
// which are staged in shared memory. Vulkan does not define which invocation holds which entry of a matrix. So products
// are written to shared memory for the LANES invocations of their row, which write them back as 16-bit weights.

#ifdef BFLOAT
#define ELEMENT bfloat16_t
#else
#define ELEMENT float16_t
#endif

layout(constant_id = 8) const uint M = 16;
layout(constant_id = 9) const uint N = 16;
layout(constant_id = 10) const uint K = 16;

#define LEFT_TILE coopmat<ELEMENT, gl_ScopeSubgroup, M, K, gl_MatrixUseA>
#define RIGHT_TILE coopmat<ELEMENT, gl_ScopeSubgroup, K, N, gl_MatrixUseB>
#define SUM_TILE coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>
#define BY_ROWS gl_CooperativeMatrixLayoutRowMajor
#define BY_COLUMNS gl_CooperativeMatrixLayoutColumnMajor

const uint OWNED = SLOTS * ROWS, STEP = KEYS, SHARE = STEP / LANES;
const uint K_VECTORS = K / 4, N_VECTORS = N / 4;  // STORED holds four elements
// 16 bytes longer than a row, so that adjacent rows use different banks of shared memory
const uint TILE_STRIDE = (DIM > DIM_V ? DIM : DIM_V) + 2, SCORE_STRIDE = STEP + 4, WEIGHT_STRIDE = STEP / 4 + 2;

uint own_row() { return gl_SubgroupID * M; }

// Return where the scores, and the weights, of this invocation's n-th row and of its keys of a step begin.
uint score_at(uint n) { return (n * SLOTS + slot()) * SCORE_STRIDE + lane() * SHARE; }
uint weight_at(uint n) { return (n * SLOTS + slot()) * WEIGHT_STRIDE + lane() * SHARE / 4; }

float max_lanes(float x) {
    [[unroll]] for (uint step = 1; step < LANES; step *= 2) x = max(x, subgroupShuffleXor(x, step));
    return x;
}

// Macros, because GLSL functions take neither buffers nor arrays of matrices. A whole workgroup must run them together.

// Load STEP rows of `width` vectors into `tile`, zeros for rows that are not used. `used` and `address` (in `memory`)
// are expressions of the row number r.
#define STAGE(tile, memory, width, used, address)                                                       \
    [[dont_unroll]] for (uint x = gl_LocalInvocationID.x; x < STEP * width; x += WORKGROUP) {           \
        uint r = x / width;                                                                             \
        tile[r * TILE_STRIDE + x % width] = (used) ? memory[(address) + x % width] : STORED(0);         \
    }

// Load the OWNED rows of all subgroups through `tile`; `address` is an expression of base + r.
#define LOAD_OWN(left, tile, memory, width, address)                                                    \
    [[dont_unroll]] for (uint base = 0; base < OWNED; base += STEP) {                                   \
        STAGE(tile, memory, width, true, address)                                                       \
        barrier();                                                                                      \
        if (own_row() >= base && own_row() < base + STEP) {                                             \
            [[dont_unroll]] for (uint i = 0; i < width / K_VECTORS; ++i) {                              \
                uint from = (own_row() - base) * TILE_STRIDE + i * K_VECTORS;                           \
                coopMatLoad(left[i], tile, from, TILE_STRIDE, BY_ROWS);                                 \
            }                                                                                           \
        }                                                                                               \
        barrier();                                                                                      \
    }

// Multiply the subgroup's rows by the rows of `tile`.
#define MULTIPLY(scores, left, tile, width)                                                             \
    [[dont_unroll]] for (uint c = 0; c < STEP; c += N) {                                                \
        SUM_TILE sum = SUM_TILE(0.0);                                                                   \
        [[dont_unroll]] for (uint i = 0; i < width / K_VECTORS; ++i) {                                  \
            RIGHT_TILE right;                                                                           \
            coopMatLoad(right, tile, c * TILE_STRIDE + i * K_VECTORS, TILE_STRIDE, BY_COLUMNS);         \
            sum = coopMatMulAdd(left[i], right, sum);                                                   \
        }                                                                                               \
        coopMatStore(sum, scores, own_row() * SCORE_STRIDE + c, SCORE_STRIDE, BY_ROWS);                 \
    }

// Add the rows of `tile` times their weights to the subgroup's accumulators.
#define ADD_WEIGHTED(sums, weights, tile, width)                                                        \
    [[dont_unroll]] for (uint c = 0; c < STEP; c += K) {                                                \
        LEFT_TILE weight;                                                                               \
        coopMatLoad(weight, weights, own_row() * WEIGHT_STRIDE + c / 4, WEIGHT_STRIDE, BY_ROWS);        \
        [[dont_unroll]] for (uint i = 0; i < width / N_VECTORS; ++i) {                                  \
            RIGHT_TILE right;                                                                           \
            coopMatLoad(right, tile, c * TILE_STRIDE + i * N_VECTORS, TILE_STRIDE, BY_ROWS);            \
            sums[i] = coopMatMulAdd(weight, right, sums[i]);                                            \
        }                                                                                               \
    }

#define CLEAR(sums, width) [[dont_unroll]] for (uint i = 0; i < width / N_VECTORS; ++i) sums[i] = SUM_TILE(0.0);

// Call write(n, i, vector i of the accumulator) for this invocation's vectors of its rows; uses the memory of `scores`.
#define WRITE_SUMS(sums, width, write)                                                                  \
    [[dont_unroll]] for (uint first = 0; first < width; first += STEP / 4) {                            \
        barrier();                                                                                      \
        [[dont_unroll]] for (uint c = 0; c < STEP / 4 && first + c < width; c += N_VECTORS) {           \
            uint to = own_row() * SCORE_STRIDE + 4 * c;                                                 \
            coopMatStore(sums[(first + c) / N_VECTORS], scores, to, SCORE_STRIDE, BY_ROWS);             \
        }                                                                                               \
        barrier();                                                                                      \
        [[unroll]] for (uint n = 0; n < ROWS; ++n) {                                                    \
            uint from = (n * SLOTS + slot()) * SCORE_STRIDE;                                            \
            [[dont_unroll]] for (uint x = lane(); x < STEP / 4 && first + x < width; x += LANES) {      \
                uint at = from + 4 * x;                                                                 \
                write(n, first + x, vec4(scores[at], scores[at + 1], scores[at + 2], scores[at + 3]));  \
            }                                                                                           \
        }                                                                                               \
    }
