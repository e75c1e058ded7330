# cmake -D SOURCE=abi_link.cpp -D "COMPILER=g++ <options>" -P abi_link.cmake
#
# Units compiled differently that pass a type of the library between them must not link; units compiled alike do, and run.

cmake_minimum_required(VERSION 3.25)

separate_arguments(compiler NATIVE_COMMAND "${COMPILER}")
set(folder ${CMAKE_CURRENT_BINARY_DIR}/abi_link)
file(MAKE_DIRECTORY ${folder})
execute_process(COMMAND ${compiler} -c ${SOURCE} -o ${folder}/callee.o COMMAND_ERROR_IS_FATAL ANY)

foreach(flags IN ITEMS "-O1" "-DEIGEN_MAX_ALIGN_BYTES=64" "-DEIGEN_MAX_ALIGN_BYTES=0" "-DEIGEN_DONT_VECTORIZE"
                       "-DEIGEN_MALLOC_ALREADY_ALIGNED=0" "-mavx")
  execute_process(COMMAND ${compiler} -DQKV_CALLER ${flags} -c ${SOURCE} -o ${folder}/caller.o COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${compiler} ${folder}/caller.o ${folder}/callee.o -o ${folder}/both RESULT_VARIABLE status
                  ERROR_VARIABLE output)
  if(flags STREQUAL "-O1")
    if(NOT status EQUAL 0)
      message(SEND_ERROR "units of one build do not link:\n${output}")
    endif()
    execute_process(COMMAND ${folder}/both COMMAND_ERROR_IS_FATAL ANY)
  elseif(status EQUAL 0 OR NOT output MATCHES "undefined")
    message(SEND_ERROR "a unit with ${flags} and one without link, or not for this reason:\n${output}")
  endif()
endforeach()
