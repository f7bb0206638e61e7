// SPDX-License-Identifier: Apache-2.0
// One macro: functions that nvcc compiles for the host and for the device. Nothing for g++.
#pragma once

#ifdef __CUDACC__
#define MMQ_HOST_DEVICE __host__ __device__
#else
#define MMQ_HOST_DEVICE
#endif
