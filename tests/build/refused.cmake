# cmake -D SOURCE=refused.cpp -D "COMPILER=g++ <options>" -P refused.cmake
#
# Every line with `refused: <text>` must be an error that names the line and says the text; the others must not be one.

cmake_minimum_required(VERSION 3.25)

# Compiled without those comments: a compiler shows the lines it complains of.
cmake_path(GET SOURCE FILENAME name)
file(READ ${SOURCE} text)
string(REGEX REPLACE "// refused: [^\n]*" "" text "${text}")
set(bare ${CMAKE_CURRENT_BINARY_DIR}/refused/${name})
file(WRITE ${bare} "${text}")

separate_arguments(command NATIVE_COMMAND "${COMPILER}")
execute_process(COMMAND ${command} -fsyntax-only ${bare} RESULT_VARIABLE status ERROR_VARIABLE output)
if(status EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles")
endif()

file(STRINGS ${SOURCE} lines)
set(number 0)
set(cases 0)
foreach(line IN LISTS lines)
  math(EXPR number "${number} + 1")
  string(FIND "${output}" "${name}:${number}:" found)
  if(line MATCHES ";.*// refused: (.*)$")
    math(EXPR cases "${cases} + 1")
    string(FIND "${output}" "${CMAKE_MATCH_1}" said)
    if(found EQUAL -1 OR said EQUAL -1)
      message(SEND_ERROR "line ${number} compiles, or not for this reason: ${line}")
    endif()
  elseif(NOT found EQUAL -1 AND line MATCHES ";")
    message(SEND_ERROR "line ${number} should compile: ${line}")
  endif()
endforeach()
message(STATUS "${cases} lines are refused")
