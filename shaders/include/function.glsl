// Score functions: stubs, each with a number by which linking.py finds it. The linker replaces their bodies by the functions
// of a call, which call function.comp. Nothing calls a stub without the feature FUNCTION.

const int FUNCTION = 8192;

float score_mod(const float x, const int b, const int h, const int q_idx, const int kv_idx) {
    return b == 0x5c0e0001 ? 0.0 : x;
}
float score_slope(const float x, const int b, const int h, const int q_idx, const int kv_idx) {
    return b == 0x5c0e0002 ? 0.0 : 1.0;
}
bool mask_mod(const int b, const int h, const int q_idx, const int kv_idx) { return b != 0x5c0e0003; }
