# SPDX-License-Identifier: Apache-2.0
# The CUDA library: which sources, how nvcc compiles them, and the two shared libraries that ship.
#
#   libmmq_cuda.so     every kernel, machine code per architecture and the PTX that it was made of;
#                      the C ABI of launchers.h
#   libmmq_cudart.so   NVIDIA's static CUDA runtime behind exported jumps (cudart.cmake), so that no
#                      NVIDIA library but the driver is needed, and so that tests can put the PTX
#                      interpreter, which has the same soname, in its place
#
# nvcc is called by custom commands: each object has its own flags and keeps its ptxas report
# (registers, spills, shared memory) beside it as <object>.log.

set(MMQ_CUDA auto CACHE STRING "CUDA kernels: auto (if nvcc is found), on, off")
set(MMQ_CUDA_ARCHS "80;86;89;90;100;120" CACHE STRING
    "Compute capabilities with machine code; the PTX that it is made of is added")
set_property(CACHE MMQ_CUDA PROPERTY STRINGS auto on off)

string(TOLOWER "${MMQ_CUDA}" mmq_cuda_choice)
if(NOT mmq_cuda_choice MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "MMQ_CUDA: expected auto, on or off, got '${MMQ_CUDA}'")
endif()

set(MMQ_CUDA_ENABLED OFF)
# The native tests and the sanitizers are about the CPU code alone.
if(mmq_cuda_choice STREQUAL "off" OR MMQ_SANITIZE OR NOT MMQ_PYTHON)
  return()
endif()
find_program(MMQ_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
             PATH_SUFFIXES bin)
if(NOT MMQ_NVCC)
  if(mmq_cuda_choice STREQUAL "on")
    message(FATAL_ERROR "MMQ_CUDA=on: expected nvcc on the PATH or under CUDA_HOME, found none; "
                        "install the CUDA toolkit 12.8 or later, or build with MMQ_CUDA=off")
  endif()
  message(STATUS "CUDA kernels: not built (no nvcc found)")
  return()
endif()

# nvcc may be a wrapper; it tells itself where its libraries lie.
execute_process(COMMAND ${MMQ_NVCC} --dryrun -x cu -c /dev/null
                ERROR_VARIABLE dryrun OUTPUT_QUIET)
if(NOT dryrun MATCHES "LIBRARIES=[^\n]*\"-L([^\"]*/lib(64)?)\"")
  message(FATAL_ERROR "MMQ_CUDA: expected library folders from '${MMQ_NVCC} --dryrun', got: "
                      "${dryrun}")
endif()
find_library(MMQ_CUDART_STATIC cudart_static PATHS ${CMAKE_MATCH_1} NO_DEFAULT_PATH)
if(NOT MMQ_CUDART_STATIC)
  message(FATAL_ERROR "MMQ_CUDA: expected libcudart_static.a in ${CMAKE_MATCH_1}, found none")
endif()

# PTX of three families: the sources differ between them (__CUDA_ARCH__), and from 100 on the
# compiler has another back end. Within a family nvcc writes the same PTX, so ptxas makes the machine
# code of each architecture from its family's, and the library carries that text too: every kernel
# that ships was assembled from a text that the tests run.
set(mmq_families 80 90 100)
string(REPLACE "," ";" mmq_archs "${MMQ_CUDA_ARCHS}")
list(SORT mmq_archs COMPARE NATURAL)
set(gencode "")
set(ptx_archs "")
foreach(arch IN LISTS mmq_archs)
  if(NOT arch MATCHES "^[0-9]+$" OR arch LESS 80)
    message(FATAL_ERROR "MMQ_CUDA_ARCHS: expected numbers from 80, such as 80;90, got '${arch}'")
  endif()
  foreach(first IN LISTS mmq_families)
    if(first LESS_EQUAL arch)
      set(family ${first})
    endif()
  endforeach()
  list(APPEND gencode -gencode arch=compute_${family},code=sm_${arch})
  list(APPEND ptx_archs ${family})
endforeach()
list(REMOVE_DUPLICATES ptx_archs)
foreach(family IN LISTS ptx_archs)
  list(APPEND gencode -gencode arch=compute_${family},code=compute_${family})
endforeach()
list(JOIN mmq_archs " " architectures)
list(TRANSFORM ptx_archs PREPEND " +ptx" OUTPUT_VARIABLE ptx_names)
list(JOIN ptx_names "" ptx_names)

# PTX stays uncompressed and carries source lines: the interpreter reads both.
set(MMQ_NVCC_FLAGS --no-compress -lineinfo -std=c++17 -O3 -Xptxas -v -Werror all-warnings
    -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror,-Wno-unused-parameter
    -I${CMAKE_SOURCE_DIR}/csrc)

# mmq_cuda_object(<list> <folder> <name> <source> <nvcc flag>...): compiles csrc/cuda/<source> to
# <folder>/<name>.o and appends that to <list>.
function(mmq_cuda_object list folder name source)
  set(object ${folder}/${name}.o)
  list(JOIN MMQ_NVCC_FLAGS " " flags)
  list(JOIN ARGN " " more)
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/${folder})
  set(command "${MMQ_NVCC} ${flags} ${more} -MD -MF ${object}.d -c \
${CMAKE_SOURCE_DIR}/csrc/cuda/${source} -o ${object}")
  add_custom_command(
    OUTPUT ${CMAKE_BINARY_DIR}/${object}
    BYPRODUCTS ${CMAKE_BINARY_DIR}/${object}.log
    COMMAND sh -c "${command} > ${object}.log 2>&1 || { cat ${object}.log; exit 1; }"
    DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/${source}
    DEPFILE ${CMAKE_BINARY_DIR}/${object}.d
    WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
    COMMENT "nvcc ${object}"
    VERBATIM)
  set(${list} ${${list}} ${CMAKE_BINARY_DIR}/${object} PARENT_SCOPE)
endfunction()

# mmq_cuda_objects(<list> <folder> <nvcc flag>...): every source of the library. Sources whose
# results are compared bit by bit with the CPU are compiled without contraction.
function(mmq_cuda_objects list folder)
  mmq_cuda_object(objects ${folder} device device.cu ${ARGN}
                  "'-DMMQ_CUDA_ARCHITECTURES=\"${architectures}${ptx_names}\"'")
  mmq_cuda_object(objects ${folder} pack pack.cu ${ARGN})
  mmq_cuda_object(objects ${folder} repack repack.cu ${ARGN})
  mmq_cuda_object(objects ${folder} gemm gemm.cu ${ARGN})
  # At its default level ptxas overlaps the products of 64 rows until it spills.
  foreach(bits 2 3 4 5 6 7 8)
    mmq_cuda_object(objects ${folder} gemm_${bits} gemm_width.cu -DMMQ_BITS=${bits} -Xptxas -O1
                    ${ARGN})
  endforeach()
  mmq_cuda_object(objects ${folder} gptq_block gptq_block.cu --fmad=false ${ARGN})
  mmq_cuda_object(objects ${folder} awq_errors awq_errors.cu --fmad=false ${ARGN})
  set(${list} ${objects} PARENT_SCOPE)
endfunction()

# A shared library of objects that nvcc made. It needs libmmq_cudart.so from its own folder.
function(mmq_cuda_library target output_dir)
  add_library(${target} SHARED ${ARGN})
  set_source_files_properties(${ARGN} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  target_link_libraries(${target} PRIVATE ${MMQ_CUDART})
  set_target_properties(${target} PROPERTIES
    LINKER_LANGUAGE CXX LIBRARY_OUTPUT_DIRECTORY ${output_dir}
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN" NO_SONAME ON)
  add_dependencies(${target} mmq_cudart)
endfunction()

mmq_cuda_objects(cuda_objects cuda ${gencode})

set(MMQ_CUDART ${MMQ_OUTPUT_DIR}/libmmq_cudart.so)
add_custom_command(
  OUTPUT ${MMQ_CUDART}
  COMMAND ${CMAKE_COMMAND} -DCUDART_STATIC=${MMQ_CUDART_STATIC} -DCXX=${CMAKE_CXX_COMPILER}
          -DNM=${CMAKE_NM} -DOBJCOPY=${CMAKE_OBJCOPY} "-DOBJECTS=${cuda_objects}"
          -DFOLDER=${CMAKE_BINARY_DIR}/cuda -DOUTPUT=${MMQ_CUDART}
          -P ${CMAKE_CURRENT_LIST_DIR}/cudart.cmake
  DEPENDS ${cuda_objects} ${CMAKE_CURRENT_LIST_DIR}/cudart.cmake
  COMMENT "libmmq_cudart.so"
  VERBATIM)
add_custom_target(mmq_cudart DEPENDS ${MMQ_CUDART})
mmq_cuda_library(mmq_cuda ${MMQ_OUTPUT_DIR} ${cuda_objects})
target_link_options(mmq_cuda PRIVATE -Wl,-z,defs)
include(${CMAKE_CURRENT_LIST_DIR}/cuda_mutations.cmake)

set(MMQ_CUDA_ENABLED ON)
message(STATUS "CUDA kernels: ${architectures}${ptx_names}, ${MMQ_NVCC}")
