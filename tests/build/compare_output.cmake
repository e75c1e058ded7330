# cmake -D PROGRAM=... -D EXPECTED=file [-D EMULATOR=...] -P compare_output.cmake
#
# The program ends with status 0 and prints the text of EXPECTED, trailing white space aside.

cmake_minimum_required(VERSION 3.25)

execute_process(COMMAND ${EMULATOR} ${PROGRAM} OUTPUT_VARIABLE output RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "the program ended with status ${status}\n${output}")
endif()
file(READ "${EXPECTED}" expected)
foreach(text output expected)
  string(REGEX REPLACE "[ \t]+\n" "\n" ${text} "${${text}}\n")
  string(STRIP "${${text}}" ${text})
endforeach()
if(NOT output STREQUAL expected)
  message(FATAL_ERROR "it printed\n${output}\n\nand the text shown is\n${expected}")
endif()
message("${output}")
