# cmake -D INCLUDE_DIR=include -D COMPILER=g++ -P abi_names.cmake
#
# Translation units whose code differs must not share the name of the inline namespace: pairwise different flags of x86,
# pairwise different names.

cmake_minimum_required(VERSION 3.25)

set(flags "-mno-avx" "-mavx" "-mavx2" "-mavx2 -mfma" "-mavx2 -mfma -mf16c" "-mavx512f -mfma -mf16c"
          "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c" "-mavx2 -DEIGEN_DONT_VECTORIZE" "-mavx2 -fno-exceptions")
set(file ${CMAKE_CURRENT_BINARY_DIR}/abi_name.cpp)
file(WRITE ${file} "#include <qkv/version.hpp>\nqkv_abi_is QKV_ABI\n")

set(names "")
foreach(some IN LISTS flags)
  separate_arguments(options NATIVE_COMMAND "${some}")
  execute_process(COMMAND ${COMPILER} -std=c++20 ${options} -I${INCLUDE_DIR} -E ${file} OUTPUT_VARIABLE text
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "qkv_abi_is ([a-z0-9_]+)" found "${text}")
  message(STATUS "${some}: ${CMAKE_MATCH_1}")
  if(CMAKE_MATCH_1 IN_LIST names)
    message(SEND_ERROR "${CMAKE_MATCH_1} is the name of two builds")
  endif()
  list(APPEND names "${CMAKE_MATCH_1}")
endforeach()
