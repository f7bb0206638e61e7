# SPDX-License-Identifier: Apache-2.0
# Builds libmmq_cudart.so: NVIDIA's static CUDA runtime with exactly the functions exported that
# OBJECTS leave undefined. A static archive cannot export them itself (its symbols are hidden), so
# each is renamed to static_<name> and exported again as a jump.
#
# cmake -DCUDART_STATIC= -DCXX= -DNM= -DOBJCOPY= -DOBJECTS= -DFOLDER= -DOUTPUT= -P cudart.cmake

set(symbols "")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -u ${object}
                  OUTPUT_VARIABLE undefined COMMAND_ERROR_IS_FATAL ANY)
  # Whole names only: mangled ones of our own may contain such a part.
  string(REGEX MATCHALL " U (__)?cuda[A-Za-z0-9_]+" found "${undefined}")
  list(TRANSFORM found REPLACE "^ U " "")
  list(APPEND symbols ${found})
endforeach()
list(REMOVE_DUPLICATES symbols)
list(SORT symbols)
if(NOT symbols)
  message(FATAL_ERROR "cudart.cmake: expected undefined CUDA functions in the objects, found none")
endif()

set(renames "")
set(jumps ".text\n")
set(exports "")
foreach(symbol IN LISTS symbols)
  string(APPEND renames "${symbol} static_${symbol}\n")
  string(APPEND jumps ".globl ${symbol}\n.type ${symbol}, @function\n"
                      "${symbol}:\n  jmp static_${symbol}@PLT\n")
  string(APPEND exports "${symbol}; ")
endforeach()
string(APPEND jumps ".section .note.GNU-stack,\"\",@progbits\n")
file(WRITE ${FOLDER}/cudart_renames.txt "${renames}")
file(WRITE ${FOLDER}/cudart_jumps.s "${jumps}")
file(WRITE ${FOLDER}/cudart_exports.map "{ global: ${exports}local: *; };\n")

execute_process(COMMAND ${OBJCOPY} --redefine-syms=${FOLDER}/cudart_renames.txt ${CUDART_STATIC}
                        ${FOLDER}/libcudart_renamed.a COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CXX} -shared -o ${OUTPUT} ${FOLDER}/cudart_jumps.s
                        ${FOLDER}/libcudart_renamed.a -Wl,-soname,libmmq_cudart.so
                        -Wl,--version-script=${FOLDER}/cudart_exports.map -Wl,-z,defs
                        -ldl -lpthread -lrt COMMAND_ERROR_IS_FATAL ANY)
