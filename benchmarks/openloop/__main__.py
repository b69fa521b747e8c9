from benchmarks.openloop import build

print(build())
