package nbd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority signs certificates for a test.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, key: newKey(t), next: 2}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a.cert, _ = x509.ParseCertificate(a.sign(template, template, &a.key.PublicKey))
	return a
}

func (a *authority) sign(template, parent *x509.Certificate, key *ecdsa.PublicKey) []byte {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// issue makes a certificate, with its key, both in DER.
func (a *authority) issue(name string) (cert, key []byte, serial *big.Int) {
	k := newKey(a.t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	a.next++
	key, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.sign(template, a.cert, &k.PublicKey), key, template.SerialNumber
}

// revoke makes a list that revokes the given certificates.
func (a *authority) revoke(next time.Time, serials ...*big.Int) []byte {
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: next}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: s, RevocationTime: time.Now().Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

func writePEM(t testing.TB, path, kind string, der []byte) {
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// newDirectory is a directory as LoadTLS wants it, with a client's certificate for tools that want one there too.
func (a *authority) newDirectory() string {
	dir := a.t.TempDir()
	writePEM(a.t, filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", a.cert.Raw)
	for _, side := range []string{"server", "client"} {
		cert, key, _ := a.issue(side)
		writePEM(a.t, filepath.Join(dir, side+"-cert.pem"), "CERTIFICATE", cert)
		writePEM(a.t, filepath.Join(dir, side+"-key.pem"), "PRIVATE KEY", key)
	}
	return dir
}

func (a *authority) clientConfig(cert, key []byte) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	config := &tls.Config{RootCAs: pool, ServerName: "localhost"}
	if cert != nil {
		k, err := x509.ParsePKCS8PrivateKey(key)
		if err != nil {
			a.t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: k}}
	}
	return config
}

func mustLoadTLS(t testing.TB, dir string, verifyPeer bool) *tls.Config {
	config, err := LoadTLS(dir, verifyPeer)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func TestTLSRequired(t *testing.T) {
	a := newAuthority(t)
	s := startServer(t, Config{TLS: mustLoadTLS(t, a.newDirectory(), false), TLSMode: TLSRequire}, testExport(t))
	c := s.dial()
	c.greet()
	for _, number := range []uint32{optList, optInfo, optGo, optStructuredReply, optListMetaContext, 99} {
		c.option(number, "x")
		c.expectRefusal(number, repErrTLSRequired)
	}
	c.option(optStartTLS, "x")
	c.expectRefusal(optStartTLS, repErrInvalid)
	if err := c.startTLS(a.clientConfig(nil, nil)); err != nil {
		t.Fatal(err)
	}
	c.option(optStartTLS)
	c.expectRefusal(optStartTLS, repErrInvalid)
	c.option(optList)
	c.expectReply(optList, repServer, text("disk"), "a test's")
	c.expectReply(optList, repAck)
	c.goTo("disk")
	if !s.connections(1)[0].TLS {
		t.Error("the connection is not shown as encrypted")
	}
	data := make([]byte, 700<<10)
	for i := range data {
		data[i] = byte(i * i >> 8)
	}
	c.request(cmdWrite, 0, 1, 0, uint32(len(data)), data)
	c.expectSimple(1, 0)
	for i := range 40 {
		c.request(cmdRead, 0, uint64(i), uint64(i*4096), 4096)
	}
	for i := range 40 {
		c.expectSimple(uint64(i), 0, data[i*4096:(i+1)*4096])
	}
	c.request(cmdRead, 0, 2, 0, uint32(len(data)))
	c.expectSimple(2, 0, data)
	c.disconnect()

	c = s.dial()
	c.greet()
	c.option(optExportName, "disk")
	c.expectEnd()
	c = s.dial()
	c.greet()
	c.option(optAbort)
	c.expectReply(optAbort, repAck)
	c.expectEnd()
}

// TestTLSForgets: what was negotiated in the clear does not count any more.
func TestTLSForgets(t *testing.T) {
	a := newAuthority(t)
	s := startServer(t, Config{TLS: mustLoadTLS(t, a.newDirectory(), false), TLSMode: TLSAllow}, testExport(t))
	c := s.dial()
	c.greet()
	c.option(optStructuredReply)
	c.expectReply(optStructuredReply, repAck)
	if err := c.startTLS(a.clientConfig(nil, nil)); err != nil {
		t.Fatal(err)
	}
	c.goTo("disk")
	c.request(cmdRead, 0, 1, 0, 1)
	c.expectSimple(1, 0, "\x00")
	c.disconnect()
	clear := s.dial()
	clear.enter("disk", false)
	clear.disconnect()
}

func TestTLSShutdown(t *testing.T) {
	a := newAuthority(t)
	d := newHeldDevice(t, holdWrites)
	config := Config{TLS: mustLoadTLS(t, a.newDirectory(), false), TLSMode: TLSRequire}
	s := startServer(t, config, &Export{Name: "disk", Device: d})
	c := s.dial()
	c.greet()
	if err := c.startTLS(a.clientConfig(nil, nil)); err != nil {
		t.Fatal(err)
	}
	c.goTo("disk")
	c.request(cmdWrite, 0, 1, 0, 512, make([]byte, 512))
	r := d.next(t)
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(testContext(t)) }()
	d.fileDevice.Submit(r)
	c.expectSimple(1, 0)
	c.expectEnd()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestTLSPipe: TLS over a stream without a descriptor.
func TestTLSPipe(t *testing.T) {
	a := newAuthority(t)
	s := startServer(t, Config{TLS: mustLoadTLS(t, a.newDirectory(), false), TLSMode: TLSRequire}, testExport(t))
	ours, theirs := net.Pipe()
	s.accept(theirs)
	c := newClient(t, ours)
	c.greet()
	if err := c.startTLS(a.clientConfig(nil, nil)); err != nil {
		t.Fatal(err)
	}
	c.goTo("disk")
	c.request(cmdRead, 0, 1, 0, 1)
	c.expectSimple(1, 0, "\x00")
	c.request(cmdDisconnect, 0, 0, 0, 0)
	c.expectEnd()
}

func TestTLSClientCertificates(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	dir := a.newDirectory()
	good, goodKey, _ := a.issue("good")
	bad, badKey, badSerial := a.issue("bad")
	foreign, foreignKey, _ := other.issue("foreign")
	writePEM(t, filepath.Join(dir, "ca-crl.pem"), "X509 CRL", a.revoke(time.Now().Add(time.Hour), badSerial))
	s := startServer(t, Config{TLS: mustLoadTLS(t, dir, true), TLSMode: TLSRequire}, testExport(t))
	for _, tc := range []struct {
		name      string
		cert, key []byte
		ok        bool
	}{
		{"good", good, goodKey, true}, {"revoked", bad, badKey, false}, {"foreign", foreign, foreignKey, false},
		{"none", nil, nil, false},
	} {
		c := s.dial()
		c.greet()
		err := c.startTLS(a.clientConfig(tc.cert, tc.key))
		if err == nil { // with TLS 1.3 the client learns of its refusal only with the first answer
			_, err = c.conn.Write(message(uint64(magicOption), uint32(optList), uint32(0)))
		}
		if err == nil {
			_, err = c.conn.Read(make([]byte, 1))
		}
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
		c.conn.Close()
	}
}

func TestLoadTLSRefuses(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	if _, err := LoadTLS(t.TempDir(), false); err == nil {
		t.Error("an empty directory")
	}
	for name, spoil := range map[string]func(dir string){
		"no authority":    func(dir string) { os.Remove(filepath.Join(dir, "ca-cert.pem")) },
		"empty authority": func(dir string) { os.WriteFile(filepath.Join(dir, "ca-cert.pem"), nil, 0o600) },
		"bad authority":   func(dir string) { writePEM(t, filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", []byte("x")) },
		"no key":          func(dir string) { os.Remove(filepath.Join(dir, "server-key.pem")) },
		"empty list":      func(dir string) { os.WriteFile(filepath.Join(dir, "ca-crl.pem"), nil, 0o600) },
		"bad list":        func(dir string) { writePEM(t, filepath.Join(dir, "ca-crl.pem"), "X509 CRL", []byte("x")) },
		"expired list": func(dir string) {
			writePEM(t, filepath.Join(dir, "ca-crl.pem"), "X509 CRL", a.revoke(time.Now().Add(-time.Minute)))
		},
		"another's list": func(dir string) {
			writePEM(t, filepath.Join(dir, "ca-crl.pem"), "X509 CRL", other.revoke(time.Now().Add(time.Hour)))
		},
	} {
		dir := a.newDirectory()
		spoil(dir)
		if _, err := LoadTLS(dir, true); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if got := TLSMode(9).String() + TLSOff.String() + TLSAllow.String() + TLSRequire.String(); got != "TLSMode(9)offallowrequire" {
		t.Error(got)
	}
}
