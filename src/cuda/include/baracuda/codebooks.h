// SPDX-License-Identifier: Apache-2.0
// The 4-bit codebooks of bitsandbytes: what each code stands for, and how a value finds its code.
//
// A value in [-1, 1] takes codes[number of thresholds below it]: thresholds lie in the middle of
// neighbours, and a tie takes the lower one.
#pragma once

#include <stdint.h>

#include "baracuda/api.h"

namespace bcy {

struct Codebook {
  float values[16];
  float thresholds[15];  // ascending
  uint8_t codes[16];     // by rising value
};

// Quantiles of the normal distribution (Dettmers et al., QLoRA, 2023), zero among them.
inline constexpr Codebook kNf4 = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {-0.8480963706970215f, -0.6106328964233398f, -0.4599952697753906f, -0.33967941999435425f,
     -0.23460739850997925f, -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f,
     0.120255246758461f, 0.2035212516784668f, 0.2920137643814087f, 0.3893125355243683f,
     0.5016634464263916f, 0.6427869200706482f, 0.8614784479141235f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};

// A sign, two bits of exponent, one of mantissa; the subnormal one is 1/192.
inline constexpr Codebook kFp4 = {
    {0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f,
     0.1666666716337204f, 0.25f, -0.0f, -0.0052083334885537624f, -0.6666666865348816f, -1.0f,
     -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f},
    {-0.8333333730697632f, -0.5833333730697632f, -0.4166666865348816f, -0.2916666865348816f,
     -0.2083333432674408f, -0.0859375f, -0.0026041667442768812f, 0.0f, 0.0026041667442768812f,
     0.0859375f, 0.2083333432674408f, 0.2916666865348816f, 0.4166666865348816f, 0.5833333730697632f,
     0.8333333730697632f},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}};

// nullptr for an unknown one. On the host alone; forced inline, as numeric.h explains.
inline __attribute__((always_inline)) const Codebook* codebook_of(int32_t codebook) {
  switch (codebook) {
    case BCY_NF4:
      return &kNf4;
    case BCY_FP4:
      return &kFp4;
    default:
      return nullptr;
  }
}

}  // namespace bcy
