// Numbers, and functions that drivers compute with large errors.

const float LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// tanh(x). The built-in function may lose all bits of small values.
float accurate_tanh(float x) {
    float a = abs(x);
    float square = x * x;
    float small = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))));
    float large = 1.0 - 2.0 / (exp2(min(a, 20.0) * (2.0 * LOG2E)) + 1.0);
    return a < 0.25 ? small : sign(x) * large;
}
