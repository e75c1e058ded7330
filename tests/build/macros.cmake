# cmake -D INCLUDE_DIR=include/qkv -P macros.cmake
#
# Macros have no namespace: all of ours begin with QKV_, and those that a header does not take back with #undef are these.

cmake_minimum_required(VERSION 3.25)

set(kept # what users may ask for
         QKV_VERSION_MAJOR QKV_VERSION_MINOR QKV_VERSION_PATCH
         # the name of the inline namespace, which is put together wherever it is written
         QKV_ABI QKV_DETAIL_JOIN QKV_DETAIL_JOIN2 QKV_DETAIL_ISA QKV_DETAIL_STEP QKV_DETAIL_FMA QKV_DETAIL_HALF
         QKV_DETAIL_DOT QKV_DETAIL_LANES QKV_DETAIL_ALIGN QKV_DETAIL_ALIGN1 QKV_DETAIL_ALIGN2 QKV_DETAIL_HEAP
         QKV_DETAIL_LIBRARY QKV_DETAIL_EXCEPTIONS)

file(GLOB_RECURSE headers ${INCLUDE_DIR}/*.hpp)
set(found "")
foreach(header IN LISTS headers)
  file(STRINGS ${header} lines REGEX "^[ \t]*#[ \t]*(define|undef)[ \t]")
  string(REPLACE "\\;" ";" lines "${lines}") # a line that goes on ends in a backslash
  set(defined "")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "^[ \t]*#[ \t]*(define|undef)[ \t]+([A-Za-z0-9_]+).*" "\\1;\\2" parts "${line}")
    list(GET parts 0 what)
    list(GET parts 1 macro)
    if(NOT macro MATCHES "^QKV_")
      message(SEND_ERROR "${header} defines or undefines ${macro}: macros of this library begin with QKV_")
    elseif(what STREQUAL "define")
      list(APPEND defined ${macro})
    elseif(macro IN_LIST defined)
      list(REMOVE_ITEM defined ${macro})
    else()
      message(SEND_ERROR "${header} undefines ${macro}, which is not its own")
    endif()
  endforeach()
  foreach(macro IN LISTS defined)
    if(NOT macro IN_LIST kept)
      message(SEND_ERROR "${header} leaves ${macro} defined: #undef it at the end of the header")
    endif()
  endforeach()
  list(APPEND found ${defined})
endforeach()
foreach(macro IN LISTS kept)
  if(NOT macro IN_LIST found)
    message(SEND_ERROR "${macro} is not defined any more: take it off the list")
  endif()
endforeach()
list(REMOVE_DUPLICATES found)
list(LENGTH found count)
message(STATUS "${count} macros, all QKV_, remain behind the headers")
