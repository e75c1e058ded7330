# cmake -D INCLUDE_DIR=include -D "COMPILER=g++ -isystem <Eigen>" -D CLANG=<bool> -P modes.cmake
#
# Compiler modes that would give wrong numbers are refused in words, and so is a language before C++20: by every public
# header that is included alone, in the first line, and without a flood of other errors behind it.

cmake_minimum_required(VERSION 3.25)

separate_arguments(compiler NATIVE_COMMAND "${COMPILER}")
set(file ${CMAKE_CURRENT_BINARY_DIR}/mode.cpp)

# The output of compiling `header` by `flags`, and its first error.
macro(compile header flags)
  file(WRITE ${file} "#include <qkv/${header}>\n")
  separate_arguments(options NATIVE_COMMAND "${flags}")
  execute_process(COMMAND ${compiler} -I${INCLUDE_DIR} ${options} -c ${file} -o ${file}.o RESULT_VARIABLE status
                  ERROR_VARIABLE output)
  string(REGEX MATCH "error:[^\n]*" first "${output}")
  string(REGEX MATCHALL "\n" lines "${output}")
  list(LENGTH lines count)
endmacro()

set(folders "${INCLUDE_DIR}/qkv/*.hpp")
if(NOT CLANG)  # takes twice the time
  list(APPEND folders "${INCLUDE_DIR}/qkv/kernel/*.hpp")
endif()
file(GLOB headers RELATIVE ${INCLUDE_DIR}/qkv ${folders})
foreach(header IN LISTS headers)
  set(flags -E) # it is the preprocessor that stops; seen from end to end for one header
  if(header STREQUAL "qkv.hpp")
    set(flags "")
  endif()
  compile(${header} "-std=c++17 ${flags}")
  if(status EQUAL 0 OR NOT first MATCHES "C\\+\\+20" OR count GREATER_EQUAL 20)
    message(SEND_ERROR "C++17, ${header}: ${count} lines, the first error is '${first}'")
  endif()
endforeach()
compile(qkv.hpp "-std=c++14")
if(NOT first MATCHES "C\\+\\+20" OR count GREATER_EQUAL 20)
  message(SEND_ERROR "C++14: ${count} lines, the first error is '${first}'")
endif()

set(cases "-ffast-math=without -ffast-math" "-ffinite-math-only=without -ffast-math"
          "-DEIGEN_DEFAULT_DENSE_INDEX_TYPE=int=qkv counts in std::ptrdiff_t of 64 bits")
if(CLANG)
  list(APPEND cases "-O1 -fno-honor-nans=compile without -fno-honor-nans"
       "-O1 -fno-honor-infinities=compile without -fno-honor-infinities"
       "-O2 -fassociative-math -fno-signed-zeros -fno-trapping-math=compile without -fassociative-math")
else()
  list(APPEND cases "-fassociative-math -fno-signed-zeros -fno-trapping-math=without -ffast-math")
endif()
foreach(case IN LISTS cases)
  string(REGEX MATCH "^(.*)=([^=]*)$" found "${case}")
  set(flags "${CMAKE_MATCH_1}")
  set(text "${CMAKE_MATCH_2}")
  compile(version.hpp "-std=c++20 ${flags}")
  string(FIND "${output}" "${text}" said)
  if(status EQUAL 0 OR said EQUAL -1)
    message(SEND_ERROR "${flags} is not refused, or not in these words: ${text}\n${output}")
  endif()
endforeach()
foreach(flags IN ITEMS "-O0" "-O1" "-O2" "-O2 -ffp-contract=fast -fno-math-errno")
  compile(version.hpp "-std=c++20 -Wall -Wextra -Wpedantic -Werror ${flags}")
  if(NOT status EQUAL 0)
    message(SEND_ERROR "${flags} is refused:\n${output}")
  endif()
endforeach()
list(LENGTH headers count)
message(STATUS "${count} headers ask for C++20")
