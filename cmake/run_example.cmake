# cmake -D PROGRAM=... [-D EXPECTED=file -D EMULATOR=... -D CONFORMANCE_DIR=... -D SOURCE_DIR=...] -P run_example.cmake
#
# Runs an example and checks that it ends well and prints what it claims. EXPECTED holds one regular expression (CMake's
# kind) a line, each of which must match somewhere in the output, `^` and `$` being ends of a line; `#` begins a comment.
# A line `# args: ...` gives the arguments of the run; @CONFORMANCE_DIR@ and @SOURCE_DIR@ are replaced in it.

cmake_minimum_required(VERSION 3.25)

set(args "")
set(n_claims 0)
if(EXPECTED AND EXISTS "${EXPECTED}")
  file(READ "${EXPECTED}" text)
  while(NOT text STREQUAL "") # line by line: a CMake list of lines falls over brackets and semicolons
    string(REGEX MATCH "^([^\n]*)\n?" ignored "${text}")
    set(line "${CMAKE_MATCH_1}")
    string(LENGTH "${CMAKE_MATCH_0}" length)
    string(SUBSTRING "${text}" ${length} -1 text)
    if(line MATCHES "^# args: *(.*)$")
      set(args "${CMAKE_MATCH_1}")
    elseif(NOT line MATCHES "^#" AND NOT line STREQUAL "")
      math(EXPR n_claims "${n_claims} + 1")
      set(claim_${n_claims} "${line}")
    endif()
  endwhile()
endif()

if(args MATCHES "@CONFORMANCE_DIR@" AND NOT IS_DIRECTORY "${CONFORMANCE_DIR}")
  message(STATUS "skipped: '${CONFORMANCE_DIR}' is not there; name the conformance cases by cmake -DQKV_CONFORMANCE_DIR=DIR")
  return()
endif()
string(CONFIGURE "${args}" args @ONLY)
separate_arguments(args UNIX_COMMAND "${args}")

execute_process(COMMAND ${EMULATOR} ${PROGRAM} ${args} OUTPUT_VARIABLE output ERROR_VARIABLE errors RESULT_VARIABLE status)
message("${output}${errors}")
if(NOT status EQUAL 0)
  message(FATAL_ERROR "the program ended with status ${status}")
endif()

set(n_missing 0)
foreach(i RANGE 1 ${n_claims})
  if(n_claims EQUAL 0)
    break()
  endif()
  string(REGEX REPLACE "^\\^" "(^|\n)" expression "${claim_${i}}")
  string(REGEX REPLACE "([^\\])\\$$" "\\1(\n|$)" expression "${expression}")
  if(NOT output MATCHES "${expression}")
    message("expected in the output, and missing: ${claim_${i}}")
    math(EXPR n_missing "${n_missing} + 1")
  endif()
endforeach()
if(n_missing GREATER 0)
  message(FATAL_ERROR "${n_missing} of ${n_claims} expectations are missing from the output")
endif()
