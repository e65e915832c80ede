#include "sha256.h"

#include <openssl/evp.h>
#include <stdio.h>

int sha256_text(const void *bytes, size_t count, char text[SHA256_TEXT_SIZE]) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  if (EVP_Digest(bytes, count, digest, &length, EVP_sha256(), NULL) != 1 || length != 32) return -1;
  for (unsigned int i = 0; i < length; i++) sprintf(text + 2 * i, "%02x", digest[i]);
  return 0;
}
