# A pure loop for CPython: loop.py SECONDS. Unit: iterations.
import sys
import time


def work(n):
    total = 0
    table = [3, 1, 4, 1, 5, 9, 2, 6]
    for i in range(n):
        if total & 1:
            total = total + table[i & 7] * i
        else:
            total = total ^ i
        total &= 0xFFFFFF
    return total


seconds = float(sys.argv[1])
work(1000)
print("SPEED-BEGIN python", flush=True)
start = time.monotonic()
units = 0
while True:
    work(5000)
    units += 5000
    if time.monotonic() - start >= seconds:
        break
print("SPEED-END python %d %.6f" % (units, time.monotonic() - start), flush=True)
