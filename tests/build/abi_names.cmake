# cmake -D INCLUDE_DIR=include -D "COMPILER=g++ -isystem <Eigen>" -P abi_names.cmake
#
# Translation units whose code or layout differs must not share the name of the inline namespace: pairwise different flags
# of x86, pairwise different names. What is only written differently, and the usual builds, have the names that they should.

cmake_minimum_required(VERSION 3.25)

set(avx512 "-mavx512f -mfma -mf16c")
set(flags
    # instruction sets
    "-mno-sse3" "-msse3 -mno-ssse3" "-mssse3 -mno-sse4.1" "-msse4.1 -mno-sse4.2" "-msse4.2 -mno-avx" "-mavx -mno-avx2"
    "-mavx2" "-mavx2 -mfma" "-mavx2 -mfma -mf16c" "-mavx2 -mfma -mf16c -mavxvnni"
    "-mavx2 -mfma -mf16c -DQKV_TEST_EMULATED_VNNI" "${avx512}" "${avx512} -mavx512bw" "${avx512} -mavx512dq"
    "${avx512} -mavx512vl" "${avx512} -mavx512bw -mavx512dq" "${avx512} -mavx512bw -mavx512vl"
    "${avx512} -mavx512dq -mavx512vl" "${avx512} -mavx512bw -mavx512dq -mavx512vl"
    "${avx512} -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
    "${avx512} -mavx512bw -mavx512dq -mavx512vl -mavx512bf16"
    "${avx512} -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16"
    # what Eigen is told about vectors, alignment and the heap
    "-mavx2 -DEIGEN_DONT_VECTORIZE" "-mno-sse3 -DEIGEN_DONT_VECTORIZE" "-mavx2 -DEIGEN_MAX_ALIGN_BYTES=0"
    "-mavx2 -DEIGEN_MAX_ALIGN_BYTES=16" "-mavx2 -DEIGEN_MAX_ALIGN_BYTES=64" "-mavx2 -DEIGEN_MAX_ALIGN_BYTES=128"
    "-mavx2 -DEIGEN_DONT_ALIGN_STATICALLY" "-mavx2 -DEIGEN_MAX_STATIC_ALIGN_BYTES=16"
    "-mavx2 -DEIGEN_DONT_VECTORIZE -DEIGEN_MAX_ALIGN_BYTES=32" "-mavx2 -DEIGEN_MALLOC_ALREADY_ALIGNED=1"
    "-mno-sse3 -DEIGEN_MAX_ALIGN_BYTES=0" "-mno-sse3 -DEIGEN_MAX_ALIGN_BYTES=32" "-mno-sse3 -DEIGEN_MAX_ALIGN_BYTES=64"
    "-mno-sse3 -DEIGEN_DONT_ALIGN_STATICALLY" "${avx512} -DEIGEN_MAX_ALIGN_BYTES=0" "${avx512} -DEIGEN_MAX_ALIGN_BYTES=16"
    "${avx512} -DEIGEN_MAX_ALIGN_BYTES=32" "-mno-sse3 -DEIGEN_MALLOC_ALREADY_ALIGNED=0"
    # the language and its library
    "-mavx2 -fno-exceptions" "-mavx2 -D_GLIBCXX_DEBUG" "-mavx2 -D_GLIBCXX_USE_CXX11_ABI=0")
set(same "-mavx2 -DEIGEN_DONT_ALIGN=-mavx2 -DEIGEN_MAX_ALIGN_BYTES=0" "-mavx2 -DEIGEN_MAX_ALIGN_BYTES=32=-mavx2"
         "-mavx2 -DEIGEN_MAX_STATIC_ALIGN_BYTES=0=-mavx2 -DEIGEN_DONT_ALIGN_STATICALLY")
set(known "-mno-sse3=abi_sse2" "-mavx2 -mfma -mf16c=abi_avx2_fma_f16c"
          "-mavx2 -mfma -mf16c -mavxvnni=abi_avx2_fma_f16c_vnni" "-mavx2 -fno-exceptions=abi_avx2_noexcept"
          "-mavx2 -DEIGEN_DONT_VECTORIZE=abi_avx2_novector" "-mavx2 -DEIGEN_MAX_ALIGN_BYTES=16=abi_avx2_align_16_16_32"
          "-mavx2 -DEIGEN_MAX_ALIGN_BYTES=0=abi_avx2_novector_align_0_0_32"
          "${avx512} -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16=abi_avx512_fma_f16c_bf16_vnni")

set(file ${CMAKE_CURRENT_BINARY_DIR}/abi_name.cpp)
file(WRITE ${file} "#include <qkv/version.hpp>\nqkv_abi_is QKV_ABI\n")
separate_arguments(compiler NATIVE_COMMAND "${COMPILER}")
function(name_of flags result)
  separate_arguments(options NATIVE_COMMAND "${flags}")
  execute_process(COMMAND ${compiler} -std=c++20 ${options} -I${INCLUDE_DIR} -E ${file} OUTPUT_VARIABLE text
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "qkv_abi_is ([a-z0-9_]+)" found "${text}")
  message(STATUS "${flags}: ${CMAKE_MATCH_1}")
  set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

set(names "")
foreach(some IN LISTS flags)
  name_of("${some}" name)
  if(name STREQUAL "" OR name IN_LIST names)
    message(SEND_ERROR "'${name}' is the name of two builds, one of them with ${some}")
  endif()
  list(APPEND names "${name}")
endforeach()
foreach(pair IN LISTS same)
  string(REGEX MATCH "^(.*=[0-9]+|.*[A-Z])=(-m.*)$" found "${pair}")
  set(other "${CMAKE_MATCH_2}")
  name_of("${CMAKE_MATCH_1}" name)
  name_of("${other}" expected)
  if(NOT name STREQUAL expected)
    message(SEND_ERROR "${pair}: ${name} is not ${expected}")
  endif()
endforeach()
foreach(pair IN LISTS known)
  string(REGEX MATCH "^(.*)=(abi_.*)$" found "${pair}")
  set(expected "${CMAKE_MATCH_2}")
  list(FIND flags "${CMAKE_MATCH_1}" place)
  list(GET names ${place} name)
  if(NOT name STREQUAL expected)
    message(SEND_ERROR "${pair}: it is ${name}")
  endif()
endforeach()
