// libcurl's own header. The library is opened at run time, so nothing here may call its functions
// by name. The inline functions call its variadic functions through pointers, which Swift cannot.
#ifndef CCURL_SHIM_H
#define CCURL_SHIM_H

#include <curl/curl.h>

// `function` is the address of curl_easy_setopt or curl_easy_getinfo.
typedef CURLcode (*curl_setopt_function)(CURL *, CURLoption, ...);
typedef CURLcode (*curl_getinfo_function)(CURL *, CURLINFO, ...);

static inline CURLcode curl_set_number(
  void *function, CURL *handle, CURLoption option, long value) {
  return ((curl_setopt_function)function)(handle, option, value);
}

// Texts are copied by libcurl; other pointers must stay valid while the option is set.
static inline CURLcode curl_set_pointer(
  void *function, CURL *handle, CURLoption option, const void *value) {
  return ((curl_setopt_function)function)(handle, option, value);
}

static inline CURLcode curl_set_writer(
  void *function, CURL *handle,
  size_t (*writer)(char *bytes, size_t size, size_t count, void *context), void *context) {
  curl_setopt_function set = (curl_setopt_function)function;
  CURLcode code = set(handle, CURLOPT_WRITEFUNCTION, writer);
  return code != CURLE_OK ? code : set(handle, CURLOPT_WRITEDATA, context);
}

static inline CURLcode curl_get_number(
  void *function, CURL *handle, CURLINFO information, long *value) {
  return ((curl_getinfo_function)function)(handle, information, value);
}

#endif
