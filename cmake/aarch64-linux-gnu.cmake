# 64-bit Arm with Debian's cross compiler, run under qemu-user. Linked dynamically (the allocation tests replace malloc),
# so qemu needs to know where the cross compiler's libraries are.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
find_program(QKV_QEMU_AARCH64 NAMES qemu-aarch64 qemu-aarch64-static REQUIRED)
set(CMAKE_CROSSCOMPILING_EMULATOR ${QKV_QEMU_AARCH64} -L /usr/aarch64-linux-gnu)
