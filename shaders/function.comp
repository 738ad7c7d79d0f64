#version 450
#extension GL_GOOGLE_include_directive : require
// Library of score functions: operations on float32 and int32 as operations.py defines them, which no instruction of SPIR-V
// computes. linking.py copies into a shader what a call's functions use, by name.
//
// Vulkan permits drivers large errors of exp, log, sin and cos, so they are computed here. `precise` forbids drivers to
// reorder operations on which the accuracy depends.
#include "include/numbers.glsl"

// Numbers of the call: constants and sizes, then the captured arrays, and one word more. The linker sets the binding.
layout(std430, binding = 0) readonly buffer Function { uint function_words[]; };

int read_int(const int at) { return int(function_words[at]); }
float read_float(const int at) { return uintBitsToFloat(function_words[at]); }

// Return the place of element `index` of an array. Only pairs outside the sequence have an index outside the array; it
// becomes the nearest index inside.
int place(const int start, const int size, const int index) { return start + max(min(index, size - 1), 0); }

#define INFINITY uintBitsToFloat(0x7f800000u)
#define NOT_A_NUMBER uintBitsToFloat(0x7fc00000u)
bool is_nan(const float x) { return (floatBitsToUint(x) & 0x7fffffffu) > 0x7f800000u; }
bool is_finite(const float x) { return (floatBitsToUint(x) & 0x7fffffffu) < 0x7f800000u; }

float minimum(const float a, const float b) { return is_nan(a) || (!is_nan(b) && a < b) ? a : b; }
float maximum(const float a, const float b) { return is_nan(a) || (!is_nan(b) && a > b) ? a : b; }
float sign_float(const float x) { return x > 0.0 ? 1.0 : x < 0.0 ? -1.0 : x; }

// Round towards zero to int32, clamped to its range; NaN becomes 0.
int truncate(const float x) { return is_nan(x) ? 0 : int(clamp(x, -2147483648.0, 2147483520.0)); }

// Return a // b and a mod b of integers, rounded down, with the sign of b; 0 for b = 0. SPIR-V has no remainder of
// negative integers.
int floor_divide(const int a, const int b) {
    int divisor = b == 0 ? 1 : b, quotient = a / divisor, rest = a - quotient * divisor;
    bool down = rest != 0 && (rest < 0) != (divisor < 0);
    return b == 0 ? 0 : quotient - int(down);
}
int modulo(const int a, const int b) { return b == 0 ? 0 : a - floor_divide(a, b) * b; }

int shift_left(const int a, const int bits) { return uint(bits) > 31u ? 0 : a << bits; }
int shift_right(const int a, const int bits) { return a >> (uint(bits) > 31u ? 31 : bits); }

// Return the exact remainder of |a| / |b| with the sign of a, which the quotient of floats does not give. The loop has at
// most REMAINDER_STEPS (score_code.py) iterations.
float remainder(const float a, const float b) {
    uint x = floatBitsToUint(a) & 0x7fffffffu, y = floatBitsToUint(b) & 0x7fffffffu;
    if (x >= 0x7f800000u || y > 0x7f800000u || y == 0u) return NOT_A_NUMBER;
    if (x < y) return a;
    int x_exponent = max(int(x >> 23), 1), y_exponent = max(int(y >> 23), 1);
    uint rest = x >> 23 == 0u ? x : (x & 0x7fffffu) | 0x800000u;
    uint divisor = y >> 23 == 0u ? y : (y & 0x7fffffu) | 0x800000u;
    rest %= divisor;
    for (int bits = x_exponent - y_exponent; bits > 0; bits -= 8) rest = (rest << min(bits, 8)) % divisor;
    precise float found = float(rest) * uintBitsToFloat(uint(max(y_exponent - 23, 1)) << 23);
    if (y_exponent < 24) found *= uintBitsToFloat(uint(127 + y_exponent - 24) << 23);
    return a < 0.0 ? -found : found;
}
float modulo_float(const float a, const float b) {
    precise float rest = remainder(a, b);
    if (rest != 0.0 && (rest < 0.0) != (b < 0.0)) rest += b;
    return rest;
}
float floor_divide_float(const float a, const float b) {
    precise float quotient = a / b;
    if (b == 0.0) return quotient;
    float rest = remainder(a, b);
    quotient = (a - rest) / b;
    if (rest != 0.0 && (rest < 0.0) != (b < 0.0)) quotient -= 1.0;
    return roundEven(quotient);
}

float power_of_two(const int n) { return uintBitsToFloat(uint(n + 127) << 23); }  // -126 <= n <= 127

// Return exp(x) 2^n for |n| < 200. Coefficients: Cephes, expf.c.
float scaled_exponential(const float x, const int n) {
    if (is_nan(x)) return x;
    precise float near = clamp(x, -250.0, 250.0), whole = roundEven(near * 1.4426950408889634);
    precise float r = (near - whole * 0.693359375) + whole * 2.12194440e-4;
    precise float p = 1.9875691500e-4 * r + 1.3981999507e-3;
    p = ((((p * r + 8.3334519073e-3) * r + 4.1665795894e-2) * r + 1.6666665459e-1) * r + 5.0000001201e-1) * (r * r) + r + 1.0;
    int exponent = clamp(int(whole) + n, -300, 300), part = exponent / 3;
    precise float scaled = p * power_of_two(part) * power_of_two(part) * power_of_two(exponent - 2 * part);
    return scaled;
}
float exponential(const float x) { return scaled_exponential(x, 0); }

float sigmoid(const float x) {
    float small = exponential(-abs(x));
    return (x >= 0.0 ? 1.0 : small) / (1.0 + small);
}
float tanh_float(const float x) { return is_nan(x) ? x : accurate_tanh(x); }

// Return log(m), where x = m 2^exponent and sqrt(1/2) <= m < sqrt(2); x > 0. Coefficients: Cephes, logf.c.
float log_mantissa(const float x, out int exponent) {
    bool tiny = x < 1.1754944e-38;
    uint bits = floatBitsToUint(tiny ? x * 8388608.0 : x);
    exponent = int(bits >> 23) - 126 - (tiny ? 23 : 0);
    float m = uintBitsToFloat((bits & 0x7fffffu) | 0x3f000000u);
    if (m < 0.70710678) {
        m *= 2.0;
        --exponent;
    }
    precise float z = m - 1.0, square = z * z, p = 7.0376836292e-2 * z - 1.1514610310e-1;
    p = ((((p * z + 1.1676998740e-1) * z - 1.2420140846e-1) * z + 1.4249322787e-1) * z - 1.6668057665e-1) * z;
    p = (((p + 2.0000714765e-1) * z - 2.4999993993e-1) * z + 3.3333331174e-1) * z * square - 0.5 * square;
    return z + p;
}
float logarithm(const float x) {
    if (!(x > 0.0) || !is_finite(x)) return x == 0.0 ? -INFINITY : x > 0.0 ? x : NOT_A_NUMBER;
    int exponent;
    precise float found = log_mantissa(x, exponent);
    found = (found - float(exponent) * 2.12194440e-4) + float(exponent) * 0.693359375;
    return found;
}

// Return a^b for a > 0, finite numbers.
float power_of_positive(const float a, const float b) {
    int exponent;
    float mantissa = log_mantissa(a, exponent);
    precise float high = uintBitsToFloat(floatBitsToUint(b) & 0xfffff000u), low = b - high;  // exact products with integers
    precise float whole = roundEven(clamp(b * float(exponent), -1000.0, 1000.0));
    if (abs(whole) > 199.0) return whole > 0.0 ? INFINITY : 0.0;
    precise float rest = (high * float(exponent) - whole) + low * float(exponent);
    return scaled_exponential(rest * 0.6931471805599453 + b * mantissa, int(whole));
}
float power(const float a, const float b) {
    if (b == 0.0 || a == 1.0) return 1.0;
    if (is_nan(a) || is_nan(b)) return NOT_A_NUMBER;
    float size = abs(a), found;
    if (size == 1.0 || (is_finite(size) && is_finite(b) && size > 0.0)) {
        found = size == 1.0 ? 1.0 : power_of_positive(size, b);
    } else {
        found = (size > 1.0) == (b > 0.0) ? INFINITY : 0.0;
    }
    bool whole = floor(b) == b, odd = whole && floor(b * 0.5) * 2.0 != b;
    if (a < 0.0 && !whole && is_finite(a)) return NOT_A_NUMBER;
    return odd && floatBitsToInt(a) < 0 ? -found : found;
}

// Return x - quadrant pi/2 in [-pi/4, pi/4] of a finite number, from as many bits of 2/pi as its exponent needs (Payne and
// Hanek, "Radian reduction for trigonometric functions", 1983). The quadrant counts modulo 4.
float reduce_angle(const float x, out uint quadrant) {
    const uint two_over_pi[8] = uint[](0u, 0x28be60dbu, 0x9391054au, 0x7f09d5f4u, 0x7d4d3770u, 0x36d8a566u, 0x4f10e410u, 0x7f9458eau);
    quadrant = 0u;
    if (abs(x) < 0.75) return x;
    uint bits = floatBitsToUint(x), mantissa = bits << 8 | 0x80000000u;
    uint exponent = (bits >> 23 & 0xffu) - 126u, first = exponent >> 5, shift = exponent & 31u;
    uvec4 window = uvec4(two_over_pi[first], two_over_pi[first + 1], two_over_pi[first + 2], two_over_pi[first + 3]);
    if (shift > 0u) window.xyz = window.xyz << shift | window.yzw >> (32u - shift);
    uint high, low, below, unused, carry;
    umulExtended(mantissa, window.z, below, unused);
    umulExtended(mantissa, window.y, high, low);
    low = uaddCarry(low, below, carry);
    high += mantissa * window.x + carry;  // high and low: the product in units of 2^-62, modulo 4
    quadrant = (high + 0x20000000u) >> 30;
    int rest = int(high - (quadrant << 30));
    precise float fraction = float(rest) * 9.3132257461547852e-10 + float(low) * 2.1684043449710089e-19;
    if (bits >> 31 != 0u) {
        quadrant = 0u - quadrant;
        fraction = -fraction;
    }
    return fraction * 1.5707963267948966;
}

// Return sin(x + quarters pi/2). Coefficients: Cephes, sinf.c.
float shifted_sine(const float x, const uint quarters) {
    if (!is_finite(x)) return NOT_A_NUMBER;
    uint quadrant;
    precise float r = reduce_angle(x, quadrant), z = r * r;
    quadrant += quarters;
    precise float sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r;
    precise float cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0;
    float found = (quadrant & 1u) != 0u ? cosine : sine;
    return (quadrant & 2u) != 0u ? -found : found;
}
float sine(const float x) { return shifted_sine(x, 0u); }
float cosine(const float x) { return shifted_sine(x, 1u); }

void main() {}
