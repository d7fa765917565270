// What csrc/ includes before any other header of torch, all of which are LibTorch Stable ABI: one binary serves torch
// >= 2.10.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000  // torch 2.10

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
