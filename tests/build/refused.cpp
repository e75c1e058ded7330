// What must not compile, one case a line: `refused` is expected at the line, and what follows it in the compiler's output.
// refused.cmake compiles this and reads the comments.
#include <qkv/absorbed_attention.hpp>
#include <qkv/attention.hpp>
#include <qkv/norm.hpp>
#include <qkv/position.hpp>
#include <qkv/projection.hpp>
#include <qkv/rope.hpp>

#include <array>
#include <utility>
#include <vector>

using namespace qkv;

struct Misspelt : Full {
  Cover covers(const Block&) const;
};
struct Mistyped {
  bool sees(const At&) const;
  bool cover(const Block&) const;
};
struct Unanswered {
  bool sees(const At&) const;
  SeenBy keys_seen(Index query) const;
};

/// One type a line: a compiler reports what does not compile once per type.
template <int Columns>
extern const Eigen::Matrix<float, Eigen::Dynamic, Columns, Eigen::RowMajor> constant;

void cases(const Matrix<float>& x, Matrix<float>& out, const Eigen::MatrixXf& columns, const Rope<float>& rope,
           const Projection<float>& projection, const RowVector<float>& gain, const LearnedPositions<float>& positions,
           std::vector<float>& numbers, const std::vector<Index>& indices, const std::vector<Window>& windows) {
  const std::array<float, 2> array{1, 2};
  const float plain_array[] = {1, 2};
  writable_view(constant<1>);                         // refused: qkv: an output must be writable, not const
  attention_into(constant<2>, x, x, x);               // refused: qkv: an output must be writable, not const
  attention_into(constant<3>.topRows(1), x, x, x);    // refused: qkv: an output must be writable, not const
  rms_norm_into(constant<4>, x, gain, 1e-6);          // refused: qkv: an output must be writable, not const
  layer_norm_into(constant<5>, x, gain, gain, 1e-6);  // refused: qkv: an output must be writable, not const
  rope.apply_into(constant<6>, x, 1, Index{0});       // refused: qkv: an output must be writable, not const
  rope.apply_in_place(constant<7>, 1, Index{0});      // refused: qkv: an output must be writable, not const
  rope.shift_in_place(constant<8>, 1, 5);             // refused: qkv: an output must be writable, not const
  positions.forward_into(constant<9>, x);             // refused: qkv: an output must be writable, not const
  projection.forward_into(constant<10>, x);           // refused: qkv: an output must be writable, not const
  attention_into(out, x * 2, x, x);                   // refused: need row-major memory with unit inner stride
  attention_into(out, columns, x, x);                 // refused: need row-major memory with unit inner stride
  attention(x, x, x, {}, soft_cap(5));                // refused: qkv: a score stands where the mask is expected
  attention(x, x, x, {}, full, causal);               // refused: qkv: a mask stands where the score is expected
  attention(x, x, x, {}, {.scale = 1}, causal);       // refused: no match
  attention(x, x, x, {}, Options<float>{}, plain);    // refused: no match
  attention(x, x, x, {}, Misspelt{});                 // refused: a member is spelt almost like one of them
  attention(x, x, x, {}, Mistyped{});      // refused: a mask's cover must be `Cover cover(const Block&) const`
  attention(x, x, x, {}, Unanswered{});    // refused: a mask's keys_seen must be
  lengths(std::vector<Index>{3});          // refused: delete
  documents(std::array<Index, 2>{3, 4});   // refused: delete
  boolean(Matrix<bool>(2, 2));             // refused: delete
  bias(Matrix<float>(2, 2));               // refused: delete
  bias(view(Matrix<float>(2, 2)));         // refused: delete
  bias(out.topRows(2));                    // refused: write bias(m), bias(std::as_const(m).topRows(n))
  bias_per_head(out.topRows(2), 1);        // refused: bias_per_head(std::as_const(m).topRows(n)
  boolean(Matrix<bool>(2, 2).topRows(1));  // refused: write boolean(m), boolean(std::as_const
  boolean_per_head(Matrix<bool>(2, 2).topRows(1), 1);      // refused: boolean_per_head(std::as_const(m).topRows
  alibi(RowVector<float>(4).head(2));                      // refused: write alibi(x), alibi(std::as_const(x).head(n))
  latent_rows(Matrix<float>(2, 3), 2);                     // refused: delete
  alibi(alibi_slopes<float>(4));                           // refused: delete
  alibi(x.col(0));                                         // refused: qkv: alibi(slopes) needs a vector in memory
  head_columns(Matrix<float>(2, 2), Index{0}, Index{1});   // refused: delete
  per_sequence(std::vector<Window>(3));                    // refused: give the list a name, and let it outlive the call
  per_sequence(std::array<Window, 2>{});                   // refused: give the list a name, and let it outlive the call
  Options<float> options{.sinks = std::vector<float>{1}};  // refused: give the vector a name, and let it outlive the
  options.sinks = std::vector<float>{1};                   // refused: give the vector a name, and let it outlive the
  options.sinks = std::array<float, 2>{1, 2};              // refused: give the vector a name, and let it outlive the
  options = {.query_offsets = std::vector<Index>{0}};      // refused: give the vector a name, and let it outlive the
  options = {.key_offsets = static_cast<const std::vector<Index>&&>(indices)};  // refused: give the vector a name, and
  options.sinks = {0, 1};                                                       // refused: error
  attention(x, x, x, {}, full, plain, {.sinks = std::vector<float>{1}});  // refused: give the vector a name, and let it

  // … and what must: spans and what stays, in options,
  Options<float> seen{.sinks = numbers, .query_offsets = std::span(indices), .key_offsets = {}};
  seen.sinks = {numbers.data(), 1};
  seen.sinks = std::span<float>(numbers).first(1);
  seen.sinks = std::as_const(numbers);
  seen.sinks = array;
  seen.sinks = plain_array;
  seen.sinks = seen.sinks.subspan(0, 1);
  seen.sinks = {};
  const std::span<const float> sinks = seen.sinks;
  seen = {.sinks = sinks};
  lengths(seen.key_offsets);
  per_sequence(windows);
  per_sequence(std::span(windows));

  // parts of a const matrix, and of a map, look at what is there.
  bias(std::as_const(out).topRows(2));
  bias_per_head(view(out).topRows(2).leftCols(1), 1);
  alibi(std::as_const(out).row(0));
  alibi(view(out).row(0).head(2));
}
