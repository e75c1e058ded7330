#include <qkv/version.hpp>
qkv_abi_is QKV_ABI
