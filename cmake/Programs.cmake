# How the project's own programs are compiled. Nothing here reaches the installed target.

add_library(qkv_warnings INTERFACE)
if(MSVC)
  target_compile_options(qkv_warnings INTERFACE /W4 $<$<BOOL:${QKV_WERROR}>:/WX>)
else()
  target_compile_options(qkv_warnings INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow
                                                $<$<BOOL:${QKV_WERROR}>:-Werror>)
endif()

# The headers of this checkout under the project's warnings.
add_library(qkv_program INTERFACE)
find_package(Threads REQUIRED) # for the executors that a program brings
target_link_libraries(qkv_program INTERFACE qkv::qkv qkv_warnings Threads::Threads)

find_program(QKV_CCACHE ccache DOC "Compiler cache, used where found")
mark_as_advanced(QKV_CCACHE)
if(PROJECT_IS_TOP_LEVEL AND QKV_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Another checkout of the same files finds the same objects.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${QKV_CCACHE})
endif()
set(CMAKE_CXX_EXTENSIONS OFF)

# qkv_skip_test(<name> <reason>): a test that ctest shows as skipped, with the reason in its output.
function(qkv_skip_test name reason)
  add_test(NAME ${name} COMMAND ${CMAKE_COMMAND} -E echo "skipped: ${reason}")
  set_tests_properties(${name} PROPERTIES SKIP_REGULAR_EXPRESSION "^skipped: ")
endfunction()
