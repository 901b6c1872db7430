// Calls, returns and indirect jumps.
#include "speed.h"

__attribute__((noipa, optimize("no-optimize-sibling-calls"))) static unsigned fibonacci(unsigned n) {
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

// A recursive function. Unit: calls.
static double calls(void) {
    unsigned n = 22;
    KEEP(n);
    unsigned result = fibonacci(n);
    KEEP(result);
    return 57313; // 2 * fibonacci(23) - 1
}

enum { PUSH, LOAD, STORE, ADD, SUB, MUL, XOR, SHIFT, LESS, JUMP_IF, JUMP, STOP };

// Three nested expressions in a loop; each operation ends in an indirect jump of its own.
static const signed char program[] = {
    PUSH, 0,     STORE, 0,                         // i = 0
    PUSH, 1,     STORE, 1,                         // x = 1
    LOAD, 1,     PUSH,  5,     MUL,   LOAD,  0,    // 8: x * 5, i
    ADD,  PUSH,  3,     XOR,   STORE, 1,           // x = (x * 5 + i) ^ 3
    LOAD, 1,     PUSH,  7,     SHIFT, LOAD,  1,    // x >> 7, x
    SUB,  STORE, 1,                                // x = (x >> 7) - x
    LOAD, 0,     PUSH,  1,     ADD,   STORE, 0,    // i++
    LOAD, 0,     LOAD,  2,     LESS,  JUMP_IF, 8,  // while (i < n)
    STOP,
};

__attribute__((noipa, optimize("no-gcse"))) static uint64_t interpret(const signed char *code, uint64_t n, uint64_t *count) {
    static const void *const target[] = {&&push, &&load, &&store, &&add,     &&sub,  &&mul,
                                         &&xor,  &&shift, &&less, &&jump_if, &&jump, &&stop};
    uint64_t stack[16], variable[3] = {0, 0, n}, *top = stack, done = 0;
    const signed char *at = code;
#define NEXT goto *(done++, target[(int)*at++])
    NEXT;
push: *top++ = *at++; NEXT;
load: *top++ = variable[(int)*at++]; NEXT;
store: variable[(int)*at++] = *--top; NEXT;
add: top--; top[-1] += *top; NEXT;
sub: top--; top[-1] -= *top; NEXT;
mul: top--; top[-1] *= *top; NEXT;
xor: top--; top[-1] ^= *top; NEXT;
shift: top--; top[-1] >>= *top; NEXT;
less: top--; top[-1] = top[-1] < *top; NEXT;
jump_if: at = *--top ? code + *at : at + 1; NEXT;
jump: at = code + *at; NEXT;
stop:
    *count = done;
    return variable[1];
}

// A bytecode interpreter with a computed jump after each operation. Unit: operations.
static double bytecode(void) {
    uint64_t count, result = interpret(program, 5000, &count);
    KEEP(result);
    return count;
}

const struct row call_rows[] = {{"calls", 0, calls}, {"bytecode", 0, bytecode}, {0, 0, 0}};
