// Runs one row for some seconds:                 speed ROW SECONDS
// Runs a row on several threads at once:         speed threads:N ROW SECONDS
// Runs a program again and again as a row:       speed repeat ROW SECONDS PROGRAM ARGUMENT...
//
// It prints "SPEED-BEGIN row" when the work is warm and "SPEED-END row units seconds" when it is over.
#include "speed.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

void fail(const char *what) {
    fflush(stdout);
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void say(const char *text) {
    size_t length = strlen(text);
    if (write(1, text, length) != (ssize_t)length) _exit(1);
}

static void begin(const char *row) {
    char line[128];
    snprintf(line, sizeof line, "SPEED-BEGIN %s\n", row);
    say(line);
}

static void end(const char *row, double units, double seconds) {
    char line[128];
    snprintf(line, sizeof line, "SPEED-END %s %.6g %.6f\n", row, units, seconds);
    say(line);
}

static const struct row *find(const char *name) {
    static const struct row *const tables[] = {integer_rows, call_rows,  float_rows, memory_rows,
                                               system_rows,  patch_rows, disk_rows};
    for (unsigned i = 0; i < sizeof tables / sizeof *tables; i++)
        for (const struct row *row = tables[i]; row->name; row++)
            if (!strcmp(row->name, name)) return row;
    fprintf(stderr, "speed: no row %s\n", name);
    exit(2);
}

static const struct row *shared;
static double deadline;

static void *worker(void *result) {
    double units = 0;
    while (now() < deadline) units += shared->step();
    *(double *)result = units;
    return 0;
}

static void threads(int count, const char *name, double seconds) {
    pthread_t thread[64];
    double units[64], sum = 0;
    if (count < 1 || count > 64) exit(2);
    shared = find(name);
    if (shared->setup) shared->setup();
    shared->step();
    char label[64];
    snprintf(label, sizeof label, "threads%d", count);
    begin(label);
    double start = now();
    deadline = start + seconds;
    for (int i = 0; i < count; i++)
        if (pthread_create(&thread[i], 0, worker, &units[i])) fail("pthread_create");
    for (int i = 0; i < count; i++) {
        pthread_join(thread[i], 0);
        sum += units[i];
    }
    end(label, sum, now() - start);
}

// Runs the program once, with its output thrown away.
static void spawn(char **argv) {
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (!child) {
        int null = open("/dev/null", O_RDWR);
        if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0) _exit(126);
        execv(argv[0], argv);
        _exit(127);
    }
    int status;
    if (waitpid(child, &status, 0) != child) fail("waitpid");
    if (status) {
        fprintf(stderr, "speed: %s: status %#x\n", argv[0], status);
        exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "nothing")) return 0;
    if (argc >= 5 && !strcmp(argv[1], "repeat")) {
        double seconds = atof(argv[3]), units = 0;
        spawn(argv + 4);
        begin(argv[2]);
        double start = now();
        do {
            spawn(argv + 4);
            units++;
        } while (now() - start < seconds);
        end(argv[2], units, now() - start);
        return 0;
    }
    if (argc == 4 && !strncmp(argv[1], "threads:", 8)) {
        threads(atoi(argv[1] + 8), argv[2], atof(argv[3]));
        return 0;
    }
    if (argc != 3) {
        fprintf(stderr, "usage: speed ROW SECONDS\n");
        return 2;
    }
    const struct row *row = find(argv[1]);
    double seconds = atof(argv[2]), units = 0;
    if (row->setup) row->setup();
    row->step();
    begin(row->name);
    double start = now();
    do units += row->step();
    while (now() - start < seconds);
    end(row->name, units, now() - start);
    return 0;
}
