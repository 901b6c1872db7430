// What the programs of the speed comparison share: a row has a name and a step that does some work and says how much.
#pragma once
#include <stdint.h>

struct row {
    const char *name;
    // Prepares what the steps need; may be null.
    void (*setup)(void);
    // Does a piece of work of about a millisecond on a processor of 2020 and returns its size in the row's unit.
    double (*step)(void);
};

// One table in each file, ended by a row without a name.
extern const struct row integer_rows[], call_rows[], float_rows[], memory_rows[], system_rows[], patch_rows[],
    disk_rows[];

// Ends the program with a message and the reason in errno.
void fail(const char *what);
// Keeps a result alive without a memory access the optimizer could see through.
#define KEEP(value) __asm__ volatile("" : : "r,m"(value) : "memory")
