import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import Testing

struct MetadataURITests {
  @Test func services() throws {
    let etcd = try MetadataURI(parsing: "etcd://u:p%40ss@a:1,[::1]:2;c?ca=/a%20b&cert=c&key=k")
    #expect(etcd.service == .etcd && etcd.isSecure)
    #expect(etcd.endpoints.map(\.description) == ["a:1", "[::1]:2", "c:2379"])
    #expect(etcd.user == "u" && etcd.password == "p@ss")
    #expect(etcd.tls == TLSFiles(authority: "/a b", certificate: "c", key: "k"))
    let bare = try MetadataURI(parsing: "10.0.0.5:2379")
    #expect(bare.service == .etcd && !bare.isSecure && bare.endpoints[0].port == 2379)
    let schemed = try MetadataURI(parsing: "etcd://https://a:1,https://b:2")
    #expect(schemed.isSecure && schemed.endpoints.map(\.host) == ["a", "b"])
    let redis = try MetadataURI(parsing: "redis://:pw@h/7")
    #expect(redis.database == 7 && redis.user == nil && redis.password == "pw")
    #expect(redis.endpoints[0].port == 6379)
    let http = try MetadataURI(parsing: "http://h:8080/metadata")
    #expect(http.path == "/metadata" && !http.isSecure && http.endpoints[0].port == 8080)
    #expect(try MetadataURI(parsing: "https://h").path == "/metadata")
    #expect(try MetadataURI(parsing: "https://h").endpoints[0].port == 443)
    #expect(try MetadataURI(parsing: "P2PHANDSHAKE").service == .peerToPeer)
  }

  @Test(
    arguments: [
      "", "ftp://h", "etcd://", "etcd://,", "etcd://a,", "redis://a,b", "http://", "etcd://h:0",
      "etcd://h:65536", "etcd://h/x", "redis://h/256", "redis://h/x", "redis://h?ca=1",
      "etcd://h?x=1",
      "etcd://h?ca", "etcd://h?ca=", "http://h#f", "http://a b", "etcd://%4@h", "etcd://%ff@h",
      "etcd://%00@h", "\u{7}", "://", ":///", "etcd://[::1", "etcd://@", "p2phandshake://x",
      "http://h?ca=f", "http://h/m?cert=f&key=g",
    ])
  func refused(text: String) {
    #expect(throws: MooncakeError.self) { try MetadataURI(parsing: text) }
  }

  @Test func passwordsStaySecret() throws {
    for text in [
      "etcd://user:secret@h", "redis://:secret@h/1", "http://u:se/cr@et@h/m", "ftp://u:secret@h",
      "etcd://u:secret@", "u:secret@h:1", "redis://:secret/@h/x", "redis://u:secret/@h",
      "etcd://u:secret/@h", "http://u:x?secret@h", "http://u:se?secret@h", "etcd://u:[secret@h",
      "etcd://u:s,secret:x@h", "u:secret@h://", "u:secret@h://x", "redis://u:secret#@h",
      "http://h/m?token=secret", "http://h/m?secret", "http://h/m?token=secret@x",
      "http://u:secret@h/m?ca=f&token=secret", "etcd://h:1?password=secret", "etcd://u:secret",
      "redis://:secret", "etcd://h:1,u:secret", "u:secret/x", "etcd://http://u:secret",
      "etcd://u:\u{308}secret@h", "http://h/m?\u{308}token=secret", "redis://secret@h",
      "REDIS://secret@h:1/2", "http://secretTOKEN@h/m", "https://secret/TOKEN==@h",
    ] {
      let shown: String
      do { shown = try MetadataURI(parsing: text).description } catch { shown = "\(error)" }
      #expect(!shown.contains("secret") && !shown.contains("cr@et"), "\(shown)")
    }
  }

  @Test func whatIsNoSecretIsShown() throws {
    for text in [
      "etcd://a:1,[::1]:2,c", "redis://h:6379/7", "http://h/m", "https://h/m?ca=/a&cert=c&key=k",
      "etcd://http://a:1", "::1", "http://admin@h/m", "etcd://svc-1@h", "admin@h",
    ] {
      #expect(RedactedURI.text(text) == text)
    }
  }

  @Test func longTextsAreCut() {
    do {
      _ = try MetadataURI(parsing: "etcd://" + String(repeating: "é\n", count: 5000))
      Issue.record("accepted")
    } catch {
      #expect(error.message.utf8.count < 2000)
    }
  }

  @Test func hostileTextsAreJudged() {
    let pieces = [
      "etcd://", "redis://", "http://", "@", ":", "/", "?", "ca=", "%", "[", "]", ",", "é",
    ]
    var generator = SystemRandomNumberGenerator()
    for _ in 0..<2000 {
      let count = Int.random(in: 0...8, using: &generator)
      let text = (0..<count).map { _ in pieces.randomElement(using: &generator)! }.joined()
      _ = try? MetadataURI(parsing: text)
    }
  }

  @Test func settings() {
    let given = MetadataSettings {
      [
        "MC_METADATA_CLUSTER_ID": "red", "MC_METADATA_TTL": "30", "MC_METADATA_USERNAME": "u",
        "MC_METADATA_PASSWORD": "", "MC_METADATA_CA_FILE": "ca", "MC_REDIS_DB_INDEX": "256",
      ][$0]
    }
    #expect(given.clusterID == "red" && given.ttlMilliseconds == 30_000 && given.user == "u")
    #expect(given.password == nil && given.tls.authority == "ca" && given.redisDatabase == 0)
    for text in ["", "1", "3601", "x", "-5"] {
      #expect(MetadataSettings { $0 == "MC_METADATA_TTL" ? text : nil }.ttlMilliseconds == 10_000)
    }
  }
}

struct EncodingTests {
  @Test func base64() {
    for (text, encoded) in [
      ("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="),
      ("fooba", "Zm9vYmE="), ("foobar", "Zm9vYmFy"),
    ] {
      #expect(Base64.encode(text.utf8) == encoded)
      #expect(Base64.decode(encoded) == Array(text.utf8))
    }
    let all = (0...255).map { UInt8($0) }
    #expect(Base64.decode(Base64.encode(all)) == all)
    for text in ["Z", "Zg", "Zg=", "====", "Z===", "Zg==Zg==", "Z-8=", "Zm9v\n", "é==="] {
      #expect(Base64.decode(text) == nil, "\(text)")
    }
  }

  @Test func percent() {
    #expect(
      PercentEncoding.encode("mooncake/ram/10.0.0.5:1 é")
        == "mooncake%2Fram%2F10.0.0.5%3A1%20%C3%A9")
    #expect(PercentEncoding.decode("a%2fb%2Fc+%C3%A9") == "a/b/c+é")
    for text in ["%", "%2", "%zz", "%ff", "%-1"] {
      #expect(PercentEncoding.decode(text[...]) == nil)
    }
  }
}
