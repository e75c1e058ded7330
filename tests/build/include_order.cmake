# cmake -D INCLUDE_DIR=include/qkv -P include_order.cmake
#
# The list in qkv.hpp is the reading order. It names every public header, and a header includes only what stands above it
# there. What is in detail/ stands outside of the order. A line `// #include` in qkv.hpp holds a place in it all the same.

cmake_minimum_required(VERSION 3.25)

set(problems 0)
function(problem text)
  message("${text}")
  math(EXPR n "${problems} + 1")
  set(problems ${n} PARENT_SCOPE)
endfunction()

# Included headers of `file`, as paths relative to INCLUDE_DIR.
function(includes_of file result)
  file(STRINGS ${INCLUDE_DIR}/${file} lines REGEX "^(// )?# *include +\"")
  cmake_path(GET file PARENT_PATH folder)
  set(found "")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "^[^\"]*\"([^\"]*)\".*" "\\1" included "${line}")
    cmake_path(SET included NORMALIZE "${folder}/${included}")
    string(REGEX REPLACE "^/" "" included "${included}")
    list(APPEND found ${included})
  endforeach()
  set(${result} ${found} PARENT_SCOPE)
endfunction()

includes_of(qkv.hpp order)
file(GLOB_RECURSE headers RELATIVE ${INCLUDE_DIR} ${INCLUDE_DIR}/*.hpp)
list(REMOVE_ITEM headers qkv.hpp)

foreach(header IN LISTS headers)
  if(header MATCHES "(^|/)detail/")
    continue()
  endif()
  list(FIND order ${header} place)
  if(place EQUAL -1)
    problem("qkv.hpp does not list ${header}")
    continue()
  endif()
  includes_of(${header} included_headers)
  foreach(included IN LISTS included_headers)
    list(FIND order ${included} place_of_included)
    if(included MATCHES "(^|/)detail/")
      continue()
    elseif(place_of_included EQUAL -1 OR place_of_included GREATER_EQUAL place)
      problem("${header} includes ${included}, which does not stand above it in qkv.hpp")
    endif()
  endforeach()
endforeach()

if(problems GREATER 0)
  message(FATAL_ERROR "${problems} places break the reading order")
endif()
list(LENGTH order length)
message(STATUS "${length} headers, each after the ones that it includes")
