// Compiled with -fno-exceptions -fno-rtti: an error calls the installed handler with the text of the rule.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <qkv/qkv.hpp>

int main() {
  qkv::set_error_handler([](const char* message) {
    std::puts(message);
    std::_Exit(std::strstr(message, "kv_heads") != nullptr ? 0 : 1);  // a handler must not return
  });
  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(5, 6);
  if (qkv::attention(x, x, x, {.heads = 3}).rows() != 5) return 1;
  return qkv::attention(x, x, x, {.heads = 3, .kv_heads = 2}).rows() == 5 ? 2 : 3;  // 3 is no multiple of 2
}
