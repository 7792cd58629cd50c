// Runs a package of AOTInductor, as `fastseg export net.pt2` writes it, without Python.
//
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O1 -I$T/include -I$T/include/torch/csrc/api/include run_a_package.cpp -o run_a_package \
//       -L$T/lib -Wl,-rpath,$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
//   ./run_a_package net.pt2 1 3 512 512 < image.raw > classes.raw
//
// Reads N * C * H * W fp32 values from the standard input; writes the values of each result to the standard output.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int count, char** words) try {
  if (count != 6) return std::fprintf(stderr, "usage: run_a_package PACKAGE N C H W\n"), 2;
  std::vector<int64_t> shape;
  for (int i = 2; i < 6; i++) shape.push_back(std::atoll(words[i]));
  const at::Tensor x = at::empty(shape, at::kFloat);
  const auto values = static_cast<size_t>(x.numel());
  if (std::fread(x.mutable_data_ptr<float>(), sizeof(float), values, stdin) != values)
    return std::fprintf(stderr, "run_a_package: the input has fewer values than the shape\n"), 1;
  torch::inductor::AOTIModelPackageLoader package(words[1]);
  for (const at::Tensor& result : package.run({x})) {
    const at::Tensor y = result.contiguous();
    std::fwrite(y.const_data_ptr(), y.element_size(), static_cast<size_t>(y.numel()), stdout);
  }
  return 0;
} catch (const std::exception& error) {
  return std::fprintf(stderr, "run_a_package: %s\n", error.what()), 1;
}
