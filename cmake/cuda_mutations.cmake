# SPDX-License-Identifier: Apache-2.0
# Libraries with one seeded bug each, on which tests/test_cuda_mutations.py shows that the
# interpreter reports it: target mmq_cuda_mutations, build/<...>/mutations/libmmq_cuda_<name>.so.
# PTX alone and only the sources that the mutation needs, so that all build within two minutes:
# packed_gemm has its 4-bit kernels, and its other widths stay undefined, which the linker allows
# where symbols are bound at their first use.

add_custom_target(mmq_cuda_mutations)

# mmq_cuda_mutation(<NAME> <object name> <source> <nvcc flag> [<object name> <source> <flag>]...):
# those csrc/cuda/<source> with -DMMQ_MUTATE_<NAME>.
function(mmq_cuda_mutation mutation)
  string(TOLOWER ${mutation} name)
  set(objects "")
  while(ARGN)
    list(POP_FRONT ARGN object source flag)
    mmq_cuda_object(objects mutations/${name} ${object} ${source} -DMMQ_MUTATE_${mutation} ${flag}
                    -gencode arch=compute_80,code=compute_80)
  endwhile()
  mmq_cuda_library(mmq_cuda_${name} ${CMAKE_BINARY_DIR}/mutations ${objects})
  target_link_options(mmq_cuda_${name} PRIVATE -Wl,-z,lazy)
  set_target_properties(mmq_cuda_${name} PROPERTIES EXCLUDE_FROM_ALL ON)
  add_dependencies(mmq_cuda_mutations mmq_cuda_${name})
endfunction()

mmq_cuda_mutation(DIVERGENT_BARRIER gptq_block gptq_block.cu --fmad=false)
foreach(mutation NO_SWIZZLE NO_CP_ASYNC_WAIT NO_BARRIER NO_ROW_GUARD SWAPPED_OPERANDS
                 UNINITIALISED_ACCUMULATOR LOCK_NOT_RESET WRONG_ZERO)
  mmq_cuda_mutation(${mutation} gemm gemm.cu -O3 gemm_4 gemm_width.cu -DMMQ_BITS=4)
endforeach()
