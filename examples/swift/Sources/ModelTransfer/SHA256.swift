import CCrypto

/// SHA-256 of memory as lower-case hexadecimal digits.
public func sha256(_ bytes: UnsafeRawBufferPointer) throws(ExampleError) -> String {
  var digest = [UInt8](repeating: 0, count: 32)
  var length: UInt32 = 0
  let result = EVP_Digest(bytes.baseAddress, bytes.count, &digest, &length, EVP_sha256(), nil)
  if result != 1 || length != 32 { throw ExampleError("SHA-256 failed") }
  return digest.map { byte in
    let digits = String(byte, radix: 16)
    return digits.count == 1 ? "0" + digits : digits
  }.joined()
}
