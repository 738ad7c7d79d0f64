#include "check.h"

int main() { return run_tests(); }
