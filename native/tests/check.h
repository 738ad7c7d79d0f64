// The smallest test framework that names what failed.
#pragma once
#include <cstdio>
#include <vector>

struct Test {
    const char *name;
    void (*body)();
};

inline std::vector<Test> &tests() {
    static std::vector<Test> all;
    return all;
}

inline int &failures() {
    static int count = 0;
    return count;
}

struct AddTest {
    AddTest(const char *name, void (*body)()) { tests().push_back({name, body}); }
};

#define TEST(name)                                \
    static void name();                           \
    static const AddTest add_##name(#name, name); \
    static void name()

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            ++failures();                                                        \
            std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
        }                                                                        \
    } while (0)

inline int run_tests() {
    for (const Test &test : tests()) {
        const int before = failures();
        std::printf("%s ...\n", test.name);
        std::fflush(stdout);
        test.body();
        if (failures() > before) std::printf("%s: %d failures\n", test.name, failures() - before);
    }
    std::printf("%zu tests, %d failures\n", tests().size(), failures());
    return failures() > 0;
}
