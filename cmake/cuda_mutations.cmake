# SPDX-License-Identifier: Apache-2.0
# Libraries with one seeded bug each, on which tests/test_cuda_mutations.py shows that the
# interpreter reports it: target mmq_cuda_mutations, build/<...>/mutations/libmmq_cuda_<name>.so.
# PTX alone and only the sources that the mutation needs, so that all build within two minutes.

add_custom_target(mmq_cuda_mutations)

# mmq_cuda_mutation(<NAME> <source> <nvcc flag>...): csrc/cuda/<source> with -DMMQ_MUTATE_<NAME>.
function(mmq_cuda_mutation mutation source)
  string(TOLOWER ${mutation} name)
  get_filename_component(stem ${source} NAME_WE)
  mmq_cuda_object(objects mutations/${name} ${stem} ${source} -DMMQ_MUTATE_${mutation}
                  -gencode arch=compute_80,code=compute_80 ${ARGN})
  mmq_cuda_library(mmq_cuda_${name} ${CMAKE_BINARY_DIR}/mutations ${objects})
  set_target_properties(mmq_cuda_${name} PROPERTIES EXCLUDE_FROM_ALL ON)
  add_dependencies(mmq_cuda_mutations mmq_cuda_${name})
endfunction()

mmq_cuda_mutation(DIVERGENT_BARRIER gptq_block.cu --fmad=false)
